// The transfer engine of a slow tier that is read by threads: the disk.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "expert/progress.h"
#include "expert/transfer_engine.h"

namespace moerun {

// Reader threads over an ExpertStore. Demand overtakes prefetch, between pieces; within one kind,
// first come, first served. A piece that fails is tried once more.
class ReaderEngine final : public TransferEngine {
 public:
  // All three must outlive the engine.
  ReaderEngine(const ExpertStore& store, Progress& progress, int num_threads);
  // Cancels what is left and waits for the reads under way.
  ~ReaderEngine() override;
  ReaderEngine(const ReaderEngine&) = delete;
  ReaderEngine& operator=(const ReaderEngine&) = delete;

  void begin_pass(Stream&) override {}
  std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks,
                                   Urgency urgency) override;
  bool is_complete(const Transfer& transfer) override;
  bool is_usable(const Transfer& transfer) override { return is_complete(transfer); }
  std::uint64_t ready(const Transfer&) const override { return 0; }
  std::uint64_t bytes_read(const Transfer& transfer) const override;
  void promote(const std::shared_ptr<Transfer>& transfer) override;
  void cancel(const std::shared_ptr<Transfer>& transfer) override;
  void drain(const std::shared_ptr<Transfer>& transfer) override;
  TransferStats stats() const override;

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
