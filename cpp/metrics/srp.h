// Segment routing best performance: how well one fixed set of experts serves a window of tokens
// (arXiv 2505.16056, "Not All Models Suit Expert Offloading").
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "metrics/routing_view.h"

namespace moerun {

enum class CountBy { expert, layer };

// Adds to `counts` how many of the overlapping windows of `segment_length` tokens activate an
// expert f times, f = 0 ... segment_length: (num_experts, segment_length + 1) numbers by expert, or
// (segment_length + 1), the sum over experts, by layer. A sequence shorter than a window has none.
// InvalidArgument for a count array of another size, or
// segments of no tokens.
void count_activations(const RoutingView& routing, std::size_t segment_length, CountBy by,
                       std::span<std::uint64_t> counts);

struct Srp {
  double srp = 0;              // the largest F1 over thresholds
  std::size_t threshold = 0;   // the smallest that reaches it: an expert with so many activations
                               // in a window belongs to the set
  double cache_ratio = 0;      // size of the set by the number of active experts
  double activation_rate = 0;  // of all (expert, token) pairs
};

// Of a group of experts (one, a layer, a model): `histogram` is the sum of theirs. All zero where
// the group was never activated.
Srp srp_of(std::span<const std::uint64_t> histogram);

}  // namespace moerun
