// Moves segments from the slow tier to the fast one, in the background, the urgent ones first.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "expert/expert_store.h"
#include "expert/progress.h"
#include "expert/staging_ring.h"

namespace moerun {

enum class Urgency { demand, prefetch };

// One segment on its way. Only the engine looks inside.
class Transfer {
 public:
  Transfer(SegmentRead read, StagingBlocks blocks, Urgency urgency)
      : read_(std::move(read)), blocks_(std::move(blocks)), urgency_(urgency) {}
  const SegmentRead& read() const { return read_; }  // does not change

 private:
  friend class TransferEngine;

  SegmentRead read_;
  StagingBlocks blocks_;  // given back when the last holder of this transfer lets go
  Urgency urgency_;
  std::size_t num_pieces_ = 0;
  std::size_t next_piece_ = 0;
  std::size_t num_done_ = 0;
  std::size_t num_in_flight_ = 0;
  std::uint64_t file_bytes_ = 0;
  bool is_cancelled_ = false;
  std::exception_ptr failure_;
};

struct TransferStats {
  std::uint64_t bytes = 0;  // read from files, also for transfers that were cancelled
  double busy_seconds = 0;  // with at least one read under way
};

// Reader threads over an ExpertStore. Demand overtakes prefetch, between pieces; within one kind,
// first come, first served. A piece that fails is tried once more.
class TransferEngine {
 public:
  // All three must outlive the engine.
  TransferEngine(const ExpertStore& store, Progress& progress, int num_threads);
  // Cancels what is left and waits for the reads under way.
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  // The memory of the runs must live until the transfer is complete or drained; blocks handed over
  // do by themselves.
  std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks, Urgency urgency);
  // Whether all of it is there. Throws what the reading threw.
  bool is_complete(const Transfer& transfer) const;
  // From files, so far.
  std::uint64_t bytes_read(const Transfer& transfer) const;
  // From now on as urgent as demand.
  void promote(const std::shared_ptr<Transfer>& transfer);
  // No more pieces will be read. Those under way still write.
  void cancel(const std::shared_ptr<Transfer>& transfer);
  // Cancels and waits until nothing writes any more.
  void drain(const std::shared_ptr<Transfer>& transfer);

  TransferStats stats() const;

 private:
  using Clock = std::chrono::steady_clock;

  void work();
  std::shared_ptr<Transfer> next_transfer();  // of which a piece is to be read, or null
  void remove(const Transfer& transfer);

  const ExpertStore& store_;
  Progress& progress_;
  mutable std::mutex mutex_;
  std::condition_variable work_arrived_;
  std::deque<std::shared_ptr<Transfer>> demand_;
  std::deque<std::shared_ptr<Transfer>> prefetch_;
  std::size_t num_reading_ = 0;
  Clock::time_point busy_since_;
  TransferStats stats_;
  bool is_stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace moerun
