// Brings experts that are not page-locked into a ring that is, part by part, by reading threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "base/view.h"
#include "expert/expert_store.h"
#include "expert/progress.h"
#include "expert/reader_engine.h"
#include "expert/staging_ring.h"
#include "expert/transfer_engine.h"

namespace moerun {

// A transfer is read in parts that fit in the ring: one block each where the store does not mind,
// else as much of it as half of the ring holds. Demand goes first, and prefetch leaves it half of
// the ring. For one thread, but stats().
class HostStage {
 public:
  // A part that lies in the ring, in the runs of `read`, for as long as `read` lives.
  struct Part {
    std::shared_ptr<Transfer> whole;
    std::shared_ptr<Transfer> read;
  };

  // `ring` has at least two blocks of a record or more. All must outlive the stage, and parts that
  // were taken may not.
  HostStage(const ModelWeights& weights, const ExpertStore& store, Bytes ring,
            std::size_t block_bytes, Progress& progress, int num_threads);

  // Sets the number of pieces of `whole` to that of its parts.
  void submit(const std::shared_ptr<Transfer>& whole);
  void promote(const std::shared_ptr<Transfer>& whole);
  void cancel(const std::shared_ptr<Transfer>& whole);

  // What has been read since the last call. Starts reading what there is room for. A failure to
  // read is noted in the transfer.
  std::vector<Part> take_landed();

  bool is_idle() const { return reading_.empty() && demand_.empty() && prefetch_.empty(); }
  TransferStats stats() const { return reader_.stats(); }

 private:
  std::size_t block_records(const SegmentRead& read) const;
  std::size_t part_blocks(const SegmentRead& read) const;
  bool start_part(const std::shared_ptr<Transfer>& whole, std::size_t num_left_free);
  void start_parts();

  const ModelWeights& weights_;
  const ExpertStore& store_;
  std::size_t block_bytes_;
  std::size_t num_blocks_;
  StagingRing ring_;
  ReaderEngine reader_;
  // With parts that have not been started, in order.
  std::deque<std::shared_ptr<Transfer>> demand_;
  std::deque<std::shared_ptr<Transfer>> prefetch_;
  std::vector<Part> reading_;
};

}  // namespace moerun
