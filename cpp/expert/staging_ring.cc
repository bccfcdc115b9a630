#include "expert/staging_ring.h"

namespace moerun {

StagingBlocks::~StagingBlocks() {
  if (ring_ != nullptr) ring_->give_back(indices_);
}

StagingRing::StagingRing(Bytes memory, std::size_t block_bytes, Progress& progress)
    : memory_(memory),
      block_bytes_(block_bytes),
      progress_(progress),
      is_free_(block_bytes == 0 ? 0 : memory.size() / block_bytes, true),
      num_free_(is_free_.size()) {}

std::optional<StagingBlocks> StagingRing::try_take(std::size_t num_blocks) {
  const std::lock_guard lock(mutex_);
  if (num_blocks > num_free_) return std::nullopt;
  std::vector<std::size_t> indices;
  // The lowest ones: neighbours make longer runs of records.
  for (std::size_t i = 0; i < is_free_.size() && indices.size() < num_blocks; ++i) {
    if (!is_free_[i]) continue;
    is_free_[i] = false;
    indices.push_back(i);
  }
  num_free_ -= num_blocks;
  return StagingBlocks(this, std::move(indices));
}

std::size_t StagingRing::num_free() const {
  const std::lock_guard lock(mutex_);
  return num_free_;
}

void StagingRing::give_back(const std::vector<std::size_t>& indices) {
  {
    const std::lock_guard lock(mutex_);
    for (const std::size_t index : indices) is_free_[index] = true;
    num_free_ += indices.size();
  }
  progress_.announce();
}

}  // namespace moerun
