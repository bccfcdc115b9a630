// The transfer engine of a slow tier that is read by threads: the disk.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/fork.h"
#include "base/per_process.h"
#include "expert/progress.h"
#include "expert/transfer_engine.h"

namespace moerun {

// Reader threads over an ExpertStore. Demand overtakes prefetch, between pieces; within one kind,
// first come, first served. A piece that fails is tried once more. A forked process reads with
// threads of its own.
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

  // The threads, and everything that is shared with them.
  struct Crew {
    Crew(ReaderEngine& engine, const TransferStats& before);
    ~Crew();

    void work(ReaderEngine& engine);
    void stop();
    std::shared_ptr<Transfer> next_transfer();  // of which a piece is to be read, or null
    void remove(const Transfer& transfer);
    void note_use();

    std::mutex mutex;
    std::condition_variable work_arrived;
    std::deque<std::shared_ptr<Transfer>> demand;
    std::deque<std::shared_ptr<Transfer>> prefetch;
    std::size_t num_working = 0;  // threads that have a piece
    std::size_t num_reading = 0;
    std::optional<InUse> in_use;  // while a thread works, or has something to do
    Clock::time_point busy_since;
    // The first failures, so that the threads are not the last to own an exception that others
    // read: the standard library counts its owners where the thread sanitizer does not see it.
    std::vector<std::exception_ptr> failures;
    TransferStats stats;
    bool is_stopping = false;
    std::vector<std::thread> threads;
  };

  Crew& crew() const;

  const ExpertStore& store_;
  Progress& progress_;
  int num_threads_;
  Origin origin_;
  mutable PerProcess<Crew> crew_;  // last: its threads use the rest
};

}  // namespace moerun
