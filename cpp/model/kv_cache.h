// The KV cache of one sequence.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "device/backend.h"
#include "device/op_params.h"
#include "weights/model_config.h"

namespace moerun {

// Address space for the whole context is reserved at once, memory comes as tokens fill it.
class KvCache {
 public:
  KvCache(const ModelConfig& config, std::size_t capacity_tokens, Backend& backend);

  KvLayer layer(std::size_t index) const;
  std::size_t capacity_tokens() const { return capacity_; }
  // Bytes of keys and values that `tokens` tokens occupy, over all layers.
  std::size_t bytes_for(std::size_t tokens) const;
  // The same of a cache that has not been made.
  static std::size_t bytes_for(const ModelConfig& config, std::size_t tokens);

 private:
  std::size_t capacity_;
  std::size_t num_kv_heads_;
  std::size_t pitch_;
  std::vector<std::unique_ptr<DeviceBuffer>> layers_;  // keys, then values
};

}  // namespace moerun
