#include "model/workspace.h"

namespace moerun {

Workspace::Workspace(const ModelConfig& config, std::size_t max_tokens) : max_tokens_(max_tokens) {
  const auto hidden_size = static_cast<std::size_t>(config.hidden_size);
  const auto q_size = static_cast<std::size_t>(config.num_attention_heads * config.head_dim);
  const auto kv_size = static_cast<std::size_t>(config.num_key_value_heads * config.head_dim);
  hidden = make(hidden_size);
  normed = make(hidden_size);
  qkv = make(q_size + 2 * kv_size);
  attended = make(q_size);
  router_logits = make(static_cast<std::size_t>(config.num_experts));
  const auto slots = static_cast<std::size_t>(config.top_k) + 1;
  expert_ids_.resize(max_tokens * slots);
  expert_weights_.resize(max_tokens * slots);
}

Activations Workspace::make(std::size_t cols) {
  const std::size_t pitch = padded(cols);
  memory_.emplace_back(max_tokens_ * pitch * sizeof(float), "activations");
  return {memory_.back().as<float>(), max_tokens_, cols, pitch};
}

Routing Workspace::routing(std::size_t tokens, std::size_t slots) {
  return {expert_ids_.data(), expert_weights_.data(), tokens, slots};
}

std::size_t Workspace::bytes() const {
  std::size_t total =
      expert_ids_.size() * sizeof(std::int32_t) + expert_weights_.size() * sizeof(float);
  for (const auto& memory : memory_) total += memory.size();
  return total;
}

}  // namespace moerun
