// Recorded routing of many sequences, as a trace file holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>
#include <vector>

#include "metrics/routing_view.h"

namespace moerun {

struct TraceView {
  // (sequences, num_layers, num_tokens, slots), sequences padded at their ends.
  std::variant<std::span<const std::uint8_t>, std::span<const std::uint16_t>> expert_ids;
  std::span<const std::int32_t> lengths;  // (sequences), each at most num_tokens
  std::size_t num_layers = 0;
  std::size_t num_tokens = 0;
  std::size_t slots = 0;
  std::size_t num_experts = 0;

  std::size_t num_sequences() const { return lengths.size(); }

  // Both copy into `memory`, which has to outlive what they return.
  RoutingView of_layer(std::size_t sequence, std::size_t layer,
                       std::vector<std::uint16_t>& memory) const;
  // One pool over all layers: a token's experts stand in layer order, expert e of layer l is
  // l * num_experts + e. InvalidArgument where that does not fit in 16 bits.
  RoutingView of_pool(std::size_t sequence, std::vector<std::uint16_t>& memory) const;
};

// InvalidArgument unless the array is as large as its axes say, each length from 0 to num_tokens,
// all ids are below num_experts, and none twice in a token. Names the first place that is wrong.
void check_trace(const TraceView& trace);

}  // namespace moerun
