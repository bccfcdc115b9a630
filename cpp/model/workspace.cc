#include "model/workspace.h"

#include <algorithm>

namespace moerun {

Workspace::Workspace(const ModelConfig& config, std::size_t max_tokens, Backend& backend)
    : backend_(backend), max_tokens_(max_tokens) {
  const auto hidden_size = static_cast<std::size_t>(config.hidden_size);
  const auto q_size = static_cast<std::size_t>(config.num_attention_heads * config.head_dim);
  const auto kv_size = static_cast<std::size_t>(config.num_key_value_heads * config.head_dim);
  hidden = make(max_tokens, hidden_size);
  normed = make(max_tokens, hidden_size);
  qkv = make(max_tokens, q_size + 2 * kv_size);
  attended = make(max_tokens, q_size);
  router_logits = make(max_tokens, static_cast<std::size_t>(config.num_experts));
  if (!backend.is_host()) {
    logits = make(std::min(kLogitRows, max_tokens), static_cast<std::size_t>(config.vocab_size));
  }
  const std::size_t pairs = max_tokens * (static_cast<std::size_t>(config.top_k) + 1);
  routing_ = make_routing(pairs, MemoryUse::streamed);
  if (!backend.is_host()) routing_on_host_ = make_routing(pairs, MemoryUse::shared);
}

Workspace::RoutingMemory Workspace::make_routing(std::size_t pairs, MemoryUse use) {
  return {backend_.allocate(pairs * sizeof(std::int32_t), "expert ids", use),
          backend_.allocate(pairs * sizeof(float), "expert weights", use)};
}

Activations Workspace::make(std::size_t rows, std::size_t cols) {
  const std::size_t pitch = padded(cols);
  memory_.push_back(
      backend_.allocate(rows * pitch * sizeof(float), "activations", MemoryUse::streamed));
  return {memory_.back()->as<float>(), rows, cols, pitch};
}

Routing Workspace::routing(std::size_t tokens, std::size_t slots) const {
  return {routing_.expert_ids->as<std::int32_t>(), routing_.expert_weights->as<float>(), tokens,
          slots};
}

Routing Workspace::routing_on_host(std::size_t tokens, std::size_t slots) const {
  if (!routing_on_host_.expert_ids) return routing(tokens, slots);
  return {routing_on_host_.expert_ids->as<std::int32_t>(),
          routing_on_host_.expert_weights->as<float>(), tokens, slots};
}

std::size_t Workspace::device_bytes_for(const ModelConfig& config, std::size_t max_tokens) {
  const auto floats = [](std::size_t rows, std::int64_t cols) {
    return rows * padded(static_cast<std::size_t>(cols));
  };
  const std::int64_t q_size = config.num_attention_heads * config.head_dim;
  const std::int64_t kv_size = config.num_key_value_heads * config.head_dim;
  const std::size_t count = 2 * floats(max_tokens, config.hidden_size) +
                            floats(max_tokens, q_size + 2 * kv_size) + floats(max_tokens, q_size) +
                            floats(max_tokens, config.num_experts) +
                            floats(std::min(kLogitRows, max_tokens), config.vocab_size);
  const std::size_t pairs = max_tokens * (static_cast<std::size_t>(config.top_k) + 1);
  return count * sizeof(float) + pairs * (sizeof(std::int32_t) + sizeof(float));
}

std::size_t Workspace::bytes() const {
  std::size_t total = routing_.expert_ids->size() + routing_.expert_weights->size();
  for (const auto& memory : memory_) total += memory->size();
  return total;
}

}  // namespace moerun
