// Hit rates of a cache of experts at every capacity, from one replay of recorded routing.
//
// At each token all experts are looked up before any is loaded; then they are served one by one in
// stored order. First touches while the cache is filling count as hits. Every policy here evicts
// the lowest of a priority that does not depend on the capacity, so a cache of c experts always
// holds the first c of one stack, and one pass serves all capacities (Mattson et al., 1970).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "metrics/routing_view.h"

namespace moerun {

enum class ReplayPolicy {
  sch,     // fewest activations still to come in the `segment_length` tokens that start with the
           // current one, then least recently used: the best that a window of foresight can do
  lru,     // least recently used
  lfu,     // fewest activations so far, also from before an eviction; then least recently used
  belady,  // next use farthest away; of those never used again the highest index first
};

// InvalidArgument for another name.
ReplayPolicy parse_replay_policy(std::string_view name);

// hits[c]: how many of the activations a cache of c experts serves, c = 0 ... num_experts.
// `segment_length` (at least 1) is for sch only.
std::vector<std::uint64_t> hits_by_capacity(const RoutingView& routing, ReplayPolicy policy,
                                            std::size_t segment_length);

}  // namespace moerun
