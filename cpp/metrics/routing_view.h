// Recorded routing of one sequence, in one layer or in all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace moerun {

// (tokens, slots) expert ids, all different within a token, below num_experts (check_trace sees to
// that); in the order in which they are served. For one layer slots = top_k; for a pool over L
// layers slots = L * top_k, layer by layer, expert e of layer l being l * E + e.
struct RoutingView {
  std::span<const std::uint16_t> expert_ids;
  std::size_t slots = 0;
  std::size_t num_experts = 0;

  std::size_t num_tokens() const { return slots == 0 ? 0 : expert_ids.size() / slots; }
  std::span<const std::uint16_t> token(std::size_t t) const {
    return expert_ids.subspan(t * slots, slots);
  }
};

}  // namespace moerun
