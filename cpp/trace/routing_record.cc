#include "trace/routing_record.h"

#include <algorithm>

namespace moerun {

void RoutingRecord::allocate() {
  const std::size_t rows = num_layers * num_tokens;
  token_ids.resize(num_tokens);
  expert_ids.resize(rows * top_k);
  if (options.with_weights) expert_weights.resize(rows * top_k);
  if (options.with_logits) router_logits.resize(rows * num_experts);
  if (options.with_predictions) predicted_ids.resize(num_tokens);
  if (options.with_prefetch) prefetch_ids.resize(rows * top_k, kNoExpert);
}

void RoutingRecord::record(std::size_t layer_index, std::size_t position,
                           std::span<const std::int32_t> ids, std::span<const float> weights) {
  if (!holds(position)) return;
  const std::size_t row = layer_index * num_tokens + position - first_position;
  const auto first = static_cast<std::ptrdiff_t>(row * top_k);
  std::transform(ids.begin(), ids.end(), expert_ids.begin() + first,
                 [](std::int32_t id) { return static_cast<std::uint16_t>(id); });
  if (options.with_weights) {
    std::copy(weights.begin(), weights.end(), expert_weights.begin() + first);
  }
}

void RoutingRecord::record_logits(std::size_t layer_index, std::size_t position,
                                  std::span<const float> logits) {
  if (!holds(position)) return;
  const std::size_t row = layer_index * num_tokens + position - first_position;
  std::copy(logits.begin(), logits.end(),
            router_logits.begin() + static_cast<std::ptrdiff_t>(row * num_experts));
}

void RoutingRecord::record_prefetch(std::size_t layer_index, std::size_t position,
                                    std::span<const std::size_t> ids) {
  if (!holds(position)) return;
  const std::size_t row = layer_index * num_tokens + position - first_position;
  std::transform(ids.begin(), ids.end(),
                 prefetch_ids.begin() + static_cast<std::ptrdiff_t>(row * top_k),
                 [](std::size_t id) { return static_cast<std::uint16_t>(id); });
}

}  // namespace moerun
