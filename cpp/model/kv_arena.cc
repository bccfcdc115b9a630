#include "model/kv_arena.h"

#include <algorithm>
#include <utility>

namespace moerun {
namespace {

// Rows of keys start on a border of 64 bytes; tokens come in groups so that few sizes occur.
constexpr std::size_t kTokenQuantum = 16;

}  // namespace

KvSlab::KvSlab(KvArena& arena, std::size_t offset, std::size_t bytes, KvCache cache)
    : arena_(arena), offset_(offset), bytes_(bytes), cache_(std::move(cache)) {}

KvSlab::~KvSlab() { arena_.give_back(offset_, bytes_); }

KvArena::KvArena(const ModelConfig& config, std::size_t bytes, Backend& backend)
    : config_(config),
      bytes_(bytes),
      memory_(backend.allocate(bytes, "the KV caches of a batch", MemoryUse::grown)) {}

std::size_t KvArena::slab_bytes(const ModelConfig& config, std::size_t tokens) {
  const std::size_t rounded = (tokens + kTokenQuantum - 1) / kTokenQuantum * kTokenQuantum;
  return KvCache::bytes_for(config, rounded);
}

std::unique_ptr<KvSlab> KvArena::try_take(std::size_t tokens) {
  const std::size_t bytes = slab_bytes(tokens);
  std::size_t offset = 0;
  for (const auto& [begin, size] : taken_) {
    if (begin - offset >= bytes) break;
    offset = begin + size;
  }
  if (bytes_ - offset < bytes) return nullptr;
  const std::size_t capacity = (tokens + kTokenQuantum - 1) / kTokenQuantum * kTokenQuantum;
  std::unique_ptr<KvSlab> slab(
      new KvSlab(*this, offset, bytes, KvCache(config_, capacity, memory_->data() + offset)));
  taken_.emplace(offset, bytes);
  used_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  return slab;
}

void KvArena::give_back(std::size_t offset, std::size_t bytes) noexcept {
  taken_.erase(offset);
  used_bytes_ -= bytes;
}

}  // namespace moerun
