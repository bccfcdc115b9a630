#include "model/kv_cache.h"

#include "base/view.h"

namespace moerun {

KvCache::KvCache(const ModelConfig& config, std::size_t capacity_tokens)
    : capacity_(capacity_tokens),
      num_kv_heads_(static_cast<std::size_t>(config.num_key_value_heads)),
      pitch_(padded(static_cast<std::size_t>(config.head_dim))),
      layers_(static_cast<std::size_t>(config.num_hidden_layers)) {}

KvCache::KvCache(const ModelConfig& config, std::size_t capacity_tokens, Backend& backend)
    : KvCache(config, capacity_tokens) {
  const std::size_t bytes = 2 * num_kv_heads_ * capacity_ * pitch_ * sizeof(float);
  for (float*& layer : layers_) {
    memory_.push_back(backend.allocate(bytes, "the KV cache", MemoryUse::grown));
    layer = memory_.back()->as<float>();
  }
}

KvCache::KvCache(const ModelConfig& config, std::size_t capacity_tokens, std::byte* memory)
    : KvCache(config, capacity_tokens) {
  auto* floats = reinterpret_cast<float*>(memory);
  for (float*& layer : layers_) {
    layer = floats;
    floats += 2 * num_kv_heads_ * capacity_ * pitch_;
  }
}

KvLayer KvCache::layer(std::size_t index) const {
  float* keys = layers_[index];
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
