// The KV cache of one sequence.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "device/backend.h"
#include "device/op_params.h"
#include "weights/model_config.h"

namespace moerun {

class KvCache {
 public:
  // Memory of its own: address space for all tokens is reserved at once, and filled as they come.
  KvCache(const ModelConfig& config, std::size_t capacity_tokens, Backend& backend);
  // In memory of somebody else, of bytes_for(config, capacity_tokens).
  KvCache(const ModelConfig& config, std::size_t capacity_tokens, std::byte* memory);

  KvLayer layer(std::size_t index) const;
  std::size_t capacity_tokens() const { return capacity_; }
  // Bytes of keys and values that `tokens` tokens occupy, over all layers.
  std::size_t bytes_for(std::size_t tokens) const;
  // The same of a cache that has not been made.
  static std::size_t bytes_for(const ModelConfig& config, std::size_t tokens);

 private:
  KvCache(const ModelConfig& config, std::size_t capacity_tokens);

  std::size_t capacity_;
  std::size_t num_kv_heads_;
  std::size_t pitch_;
  std::vector<std::unique_ptr<DeviceBuffer>> memory_;
  std::vector<float*> layers_;  // keys, then values
};

}  // namespace moerun
