// The staging ring: fast memory for segments that are computed once and forgotten.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/view.h"
#include "expert/progress.h"

namespace moerun {

class StagingRing;

// Blocks of the ring; they go back when this is destroyed, on whatever thread.
class StagingBlocks {
 public:
  StagingBlocks() = default;
  StagingBlocks(StagingBlocks&& other) noexcept { swap(other); }
  StagingBlocks& operator=(StagingBlocks&& other) noexcept {
    swap(other);
    return *this;
  }
  ~StagingBlocks();

  const std::vector<std::size_t>& indices() const { return indices_; }  // rising

 private:
  friend class StagingRing;
  StagingBlocks(StagingRing* ring, std::vector<std::size_t> indices)
      : ring_(ring), indices_(std::move(indices)) {}
  void swap(StagingBlocks& other) noexcept {
    std::swap(ring_, other.ring_);
    std::swap(indices_, other.indices_);
  }

  StagingRing* ring_ = nullptr;
  std::vector<std::size_t> indices_;
};

// Equal blocks, any of which will do: a segment may be scattered over them, for kernels take a list
// of runs of records. So there is no fragmentation, and a count of free blocks says all.
class StagingRing {
 public:
  StagingRing(Bytes memory, std::size_t block_bytes, Progress& progress);

  // None where fewer are free. Thread-safe.
  std::optional<StagingBlocks> try_take(std::size_t num_blocks);
  std::size_t num_free() const;
  std::byte* block(std::size_t index) const { return memory_.data() + index * block_bytes_; }

 private:
  friend class StagingBlocks;
  void give_back(const std::vector<std::size_t>& indices);

  Bytes memory_;
  std::size_t block_bytes_;
  Progress& progress_;
  mutable std::mutex mutex_;
  std::vector<bool> is_free_;
  std::size_t num_free_ = 0;
};

}  // namespace moerun
