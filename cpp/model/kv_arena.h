// Memory for the KV caches of many sequences, within a hard budget.
#pragma once

#include <cstddef>
#include <map>
#include <memory>

#include "device/backend.h"
#include "model/kv_cache.h"
#include "weights/model_config.h"

namespace moerun {

class KvArena;

// The KV cache of one sequence; its room goes back to the arena, which must outlive it.
class KvSlab {
 public:
  ~KvSlab();
  KvSlab(const KvSlab&) = delete;
  KvSlab& operator=(const KvSlab&) = delete;

  KvCache& cache() { return cache_; }

 private:
  friend class KvArena;
  KvSlab(KvArena& arena, std::size_t offset, std::size_t bytes, KvCache cache);

  KvArena& arena_;
  std::size_t offset_;
  std::size_t bytes_;
  KvCache cache_;
};

// Every sequence gets one piece, as large as it may ever grow: none is ever moved, or has to wait
// in the middle of its text. Not thread-safe.
class KvArena {
 public:
  // Throws OutOfMemory. The memory of a host fills as tokens come.
  KvArena(const ModelConfig& config, std::size_t bytes, Backend& backend);

  // For up to so many tokens: the lowest place that has the room, or null while there is none.
  std::unique_ptr<KvSlab> try_take(std::size_t tokens);

  // What a sequence of up to so many tokens takes.
  std::size_t slab_bytes(std::size_t tokens) const { return slab_bytes(config_, tokens); }
  static std::size_t slab_bytes(const ModelConfig& config, std::size_t tokens);
  std::size_t bytes() const { return bytes_; }
  std::size_t used_bytes() const { return used_bytes_; }
  std::size_t peak_bytes() const { return peak_bytes_; }

 private:
  friend class KvSlab;
  void give_back(std::size_t offset, std::size_t bytes) noexcept;

  const ModelConfig& config_;
  std::size_t bytes_;
  std::unique_ptr<DeviceBuffer> memory_;
  std::map<std::size_t, std::size_t> taken_;  // offset to bytes
  std::size_t used_bytes_ = 0;
  std::size_t peak_bytes_ = 0;
};

}  // namespace moerun
