// Recorded routing, played back while decoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moerun {

// Both (tokens, layers with experts, top_k); after the last token comes the first again.
struct RoutingReplay {
  std::size_t tokens = 0;
  std::vector<std::int32_t> expert_ids;
  std::vector<std::int32_t> predicted_ids;  // what the prefetcher is told, likeliest first
};

}  // namespace moerun
