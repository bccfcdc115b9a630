// How well a layer's experts are known before its router speaks: from the token before, and from
// the layer before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "metrics/routing_view.h"

namespace moerun {

// Activations that the same layer's experts of the token before name; of all tokens but the first.
std::uint64_t hits_of_previous_token(const RoutingView& routing);

// Adds to pairs[a, b] (num_experts, num_experts) in how many tokens expert a of one layer and
// expert b of the next are active together.
void count_pairs(const RoutingView& layer, const RoutingView& next, std::span<std::uint64_t> pairs);

// Activations of `next` among the top-k by score, the score of b being the sum of weights[a, b]
// over the active experts a of `layer`; equal scores go to the lower id. top-k: the slots of
// `next`.
std::uint64_t hits_of_previous_layer(const RoutingView& layer, const RoutingView& next,
                                     std::span<const float> weights);

}  // namespace moerun
