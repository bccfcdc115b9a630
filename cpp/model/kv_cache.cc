#include "model/kv_cache.h"

#include "base/view.h"

namespace moerun {

KvCache::KvCache(const ModelConfig& config, std::size_t capacity_tokens, Backend& backend)
    : capacity_(capacity_tokens),
      num_kv_heads_(static_cast<std::size_t>(config.num_key_value_heads)),
      pitch_(padded(static_cast<std::size_t>(config.head_dim))) {
  const std::size_t bytes = 2 * num_kv_heads_ * capacity_ * pitch_ * sizeof(float);
  for (std::int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    layers_.push_back(backend.allocate(bytes, "the KV cache", MemoryUse::grown));
  }
}

KvLayer KvCache::layer(std::size_t index) const {
  auto* keys = layers_[index]->as<float>();
  return {keys, keys + num_kv_heads_ * capacity_ * pitch_, capacity_, pitch_};
}

std::size_t KvCache::bytes_for(std::size_t tokens) const {
  return layers_.size() * 2 * num_kv_heads_ * tokens * pitch_ * sizeof(float);
}

std::size_t KvCache::bytes_for(const ModelConfig& config, std::size_t tokens) {
  return static_cast<std::size_t>(config.num_hidden_layers * config.num_key_value_heads) * 2 *
         tokens * padded(static_cast<std::size_t>(config.head_dim)) * sizeof(float);
}

}  // namespace moerun
