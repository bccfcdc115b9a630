// What a model takes of a device's memory, and what is left there for experts.
#pragma once

#include <cstddef>

#include "device/backend.h"
#include "expert/cache_layout.h"
#include "weights/model_config.h"
#include "weights/model_weights.h"

namespace moerun {

// Everything but routed experts, in bytes.
struct MemoryNeeds {
  std::size_t weights = 0;      // those that are always resident
  std::size_t kv_cache = 0;     // of one sequence; on a device of its whole context
  std::size_t activations = 0;  // on a device; else in the reserve
  std::size_t scratch = 0;      // likewise
  std::size_t reserve = 0;      // for what nobody counts

  std::size_t total() const { return weights + kv_cache + activations + scratch + reserve; }
};

struct MemoryPlan {
  MemoryState memory;  // before anything was taken
  MemoryNeeds needs;
  std::size_t left_for_experts = 0;
  CacheLayout layout;
};

// Throws what make_cache_layout() throws. On a device also OutOfMemory saying what is needed for
// what and what is free: with the context length that fits where the KV cache is too large, with
// the budget that fits where the budget is. On the host, which other processes share and which
// gives memory as it is used, that is found out when the weights are loaded.
MemoryPlan plan_memory(const ModelConfig& config, const ModelWeights& weights,
                       std::size_t context_length, std::size_t prefill_chunk,
                       const ExpertCacheOptions& options, const Backend& backend);

}  // namespace moerun
