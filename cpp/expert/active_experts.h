// Which experts of a layer a pass uses, in the order in which the cache is asked for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "expert/expert_cache.h"

namespace moerun {

struct ActiveExperts {
  std::vector<std::size_t> experts;   // routed ones, all different, as ExpertCache::acquire wants
  std::vector<std::size_t> num_uses;  // (num_experts + 1); the last: of the shared expert
};

// `ids`: of all tokens, each token's in the router's order; num_experts is the shared expert.
ActiveExperts active_experts(std::span<const std::int32_t> ids, std::size_t num_experts,
                             AccessMode mode);

}  // namespace moerun
