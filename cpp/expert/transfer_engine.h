// Moves segments from the slow tier to the fast one, in the background, the urgent ones first.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>

#include "device/backend.h"
#include "expert/expert_store.h"
#include "expert/progress.h"
#include "expert/staging_ring.h"

namespace moerun {

enum class Urgency { demand, prefetch };

// One segment on its way. Only engines look inside.
class Transfer {
 public:
  Transfer(SegmentRead read, StagingBlocks blocks, Urgency urgency)
      : read_(std::move(read)), blocks_(std::move(blocks)), urgency_(urgency) {}
  const SegmentRead& read() const { return read_; }       // does not change
  std::size_t num_pieces() const { return num_pieces_; }  // neither does this

 private:
  friend class ReaderEngine;
  friend class CopyEngine;
  friend class HostStage;
  friend class SimEngine;

  SegmentRead read_;
  StagingBlocks blocks_;  // given back when the last holder of this transfer lets go
  Urgency urgency_;
  std::size_t num_pieces_ = 0;
  std::size_t next_piece_ = 0;
  std::size_t num_done_ = 0;
  std::size_t num_in_flight_ = 0;
  std::uint64_t bytes_ = 0;  // that were moved for it
  std::uint64_t mark_ = 0;   // CopyEngine: when all of it will be there; 0: not all is issued
  bool is_cancelled_ = false;
  std::exception_ptr failure_;
};

struct TransferStats {
  std::uint64_t bytes = 0;  // read from the slow tier, also for transfers that were cancelled
  double busy_seconds = 0;  // with at least one read under way
};

// Demand overtakes prefetch, between pieces; within one kind, first come, first served.
class TransferEngine {
 public:
  virtual ~TransferEngine() = default;

  // Which stream computes with what is moved from now on.
  virtual void begin_pass(Stream& compute) = 0;

  // The memory of the runs must live until the transfer is complete or drained; blocks handed over
  // do by themselves.
  virtual std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks,
                                           Urgency urgency) = 0;
  // Whether all of it is there. Throws what the reading threw.
  virtual bool is_complete(const Transfer& transfer) = 0;
  // Whether it can be handed to the device, which waits itself for the CopyQueue::Mark `ready`.
  virtual bool is_usable(const Transfer& transfer) = 0;
  virtual std::uint64_t ready(const Transfer& transfer) const = 0;
  // From the slow tier, so far.
  virtual std::uint64_t bytes_read(const Transfer& transfer) const = 0;
  // From now on as urgent as demand.
  virtual void promote(const std::shared_ptr<Transfer>& transfer) = 0;
  // No more pieces will be read. Those under way still write.
  virtual void cancel(const std::shared_ptr<Transfer>& transfer) = 0;
  // Cancels and waits until nothing writes any more.
  virtual void drain(const std::shared_ptr<Transfer>& transfer) = 0;

  // Moves on what can move on by now; the other calls do so, too.
  virtual void look() {}
  // Whether transfers may move on without an announcement of Progress: then who waits has to look.
  virtual bool has_silent_progress() const { return false; }

  // Waits until something has moved on since `seen` was Progress::now(), but for at most so long;
  // false: nothing has. A simulated engine moves its clock instead.
  virtual bool wait(Progress& progress, std::uint64_t seen, std::chrono::microseconds most) {
    return progress.wait_beyond(seen, most);
  }

  virtual TransferStats stats() const = 0;
};

}  // namespace moerun
