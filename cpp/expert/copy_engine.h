// The transfer engine of a slow tier in page-locked host memory: asynchronous copies to the device.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/copy_queue.h"
#include "expert/transfer_engine.h"
#include "weights/model_weights.h"

namespace moerun {

// Demand is issued at once. Of prefetch only a few pieces are under way at a time, so that demand
// does not wait behind it; the rest follows whenever somebody looks. For one thread, but stats().
class CopyEngine final : public TransferEngine {
 public:
  // `weights` holds every expert in page-locked memory. All must outlive the engine.
  CopyEngine(const ModelWeights& weights, CopyQueue& queue);
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
  TransferStats stats() const override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Piece {
    std::byte* destination;
    const std::byte* source;
    std::size_t bytes;
  };
  struct Pending {
    std::shared_ptr<Transfer> transfer;
    std::vector<Piece> pieces;  // those that are left, the next one last
  };

  std::vector<Piece> pieces_of(const SegmentRead& read) const;
  void issue(Transfer& transfer, const Piece& piece, CopyQueue::Lane lane);
  void issue_all(Transfer& transfer, std::vector<Piece>& pieces);
  void pump();
  void look_whether_idle();

  const ModelWeights& weights_;
  CopyQueue& queue_;
  Stream* compute_ = nullptr;
  std::deque<Pending> prefetch_;
  std::deque<CopyQueue::Mark> patient_marks_;  // of the pieces under way
  CopyQueue::Mark last_urgent_ = 0;
  mutable std::mutex stats_mutex_;
  TransferStats stats_;
  bool is_busy_ = false;
  Clock::time_point busy_since_;
};

}  // namespace moerun
