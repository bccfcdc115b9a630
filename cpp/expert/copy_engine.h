// The transfer engine of a device: asynchronous copies from the host's memory.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/copy_queue.h"
#include "expert/host_stage.h"
#include "expert/transfer_engine.h"
#include "weights/host_experts.h"

namespace moerun {

// Demand is issued at once. Of prefetch only a few pieces are under way at a time, so that demand
// does not wait behind it; the rest follows whenever somebody looks. What is not page-locked goes
// through a stage that is, and is issued as it comes out of it. For one thread, but stats().
class CopyEngine final : public TransferEngine {
 public:
  // `stage`: null where every expert is page-locked. The others must outlive the engine.
  CopyEngine(const ModelWeights& weights, const HostExperts& experts, CopyQueue& queue,
             std::unique_ptr<HostStage> stage);
  // Waits for the copies under way.
  ~CopyEngine() override;
  CopyEngine(const CopyEngine&) = delete;
  CopyEngine& operator=(const CopyEngine&) = delete;

  void begin_pass(Stream& compute) override { compute_ = &compute; }
  std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks,
                                   Urgency urgency) override;
  bool is_complete(const Transfer& transfer) override;
  bool is_usable(const Transfer& transfer) override;
  std::uint64_t ready(const Transfer& transfer) const override { return transfer.mark_; }
  std::uint64_t bytes_read(const Transfer& transfer) const override { return transfer.bytes_; }
  void promote(const std::shared_ptr<Transfer>& transfer) override;
  void cancel(const std::shared_ptr<Transfer>& transfer) override;
  void drain(const std::shared_ptr<Transfer>& transfer) override;
  void look() override { pump(); }
  bool has_silent_progress() const override;
  TransferStats stats() const override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Piece {
    std::byte* destination;
    const std::byte* source;
    std::size_t bytes;
  };
  // Of a transfer, or of a part of one that has come out of the stage.
  struct Pending {
    std::shared_ptr<Transfer> transfer;
    std::vector<Piece> pieces;         // those that are left, the next one last
    std::shared_ptr<Transfer> staged;  // keeps the source; null: it is page-locked for good
  };
  struct Copying {
    CopyQueue::Mark mark;
    std::shared_ptr<Transfer> staged;
  };

  std::vector<Piece> pieces_of(const SegmentRead& read, const std::vector<RecordRun>& from) const;
  void land(HostStage::Part part);
  void issue(Pending& pending, CopyQueue::Lane lane);
  void finish(Pending& pending, CopyQueue::Mark mark);
  void issue_urgently(Pending& pending);
  void pump();
  void note_busy();
  void look_whether_idle();

  const ModelWeights& weights_;
  const HostExperts& experts_;
  CopyQueue& queue_;
  std::unique_ptr<HostStage> stage_;
  Stream* compute_ = nullptr;
  std::deque<Pending> prefetch_;
  std::deque<CopyQueue::Mark> patient_marks_;  // of the pieces under way
  std::vector<Copying> copying_;
  CopyQueue::Mark last_urgent_ = 0;
  mutable std::mutex stats_mutex_;
  TransferStats stats_;  // bytes: without the stage's
  bool is_busy_ = false;
  Clock::time_point busy_since_;
};

}  // namespace moerun
