// The slow tier of a device: experts in the host's pageable memory, and those that stay in files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "expert/expert_store.h"
#include "weights/host_experts.h"

namespace moerun {

class MemoryStore final : public ExpertStore {
 public:
  // Both must outlive the store. `files` has the experts that are not in memory; null: all are.
  MemoryStore(const ModelWeights& weights, const HostExperts& experts,
              std::unique_ptr<ExpertStore> files);

  std::size_t num_pieces(const SegmentRead& read) const override;
  // Of an expert in memory: counts the bytes that were copied.
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override;
  bool is_direct() const override { return files_ == nullptr || files_->is_direct(); }
  bool is_divisible(ExpertId id) const override {
    return is_in_memory(id) || files_->is_divisible(id);
  }

 private:
  bool is_in_memory(ExpertId id) const { return experts_.place_of(id) != HostExperts::Place::file; }

  const ModelWeights& weights_;
  const HostExperts& experts_;
  std::unique_ptr<ExpertStore> files_;
};

}  // namespace moerun
