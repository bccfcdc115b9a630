// The transfer engine of a simulation: one link, on virtual time.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "expert/transfer_engine.h"

namespace moerun {

// A piece takes fixed_s + bytes / bytes_per_s.
struct LinkCost {
  double fixed_s = 0;
  double bytes_per_s = 0;
};

// InvalidArgument for a link that takes negative time or has no rate.
void check_link_cost(const LinkCost& cost);

// Moves pieces one after the other in the order of ReaderEngine: demand before prefetch, within one
// kind first come, first served. Several reading threads are one link with their rate together. The
// link runs on while nobody looks: every call brings it up to the clock. For one thread.
class SimEngine final : public TransferEngine {
 public:
  // All must outlive the engine. Throws what check_link_cost throws.
  SimEngine(const PieceSizes& sizes, const LinkCost& cost, Progress& progress, VirtualClock& clock);

  void begin_pass(Stream&) override {}
  std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks,
                                   Urgency urgency) override;
  bool is_complete(const Transfer& transfer) override;
  bool is_usable(const Transfer& transfer) override { return is_complete(transfer); }
  std::uint64_t ready(const Transfer&) const override { return 0; }
  std::uint64_t bytes_read(const Transfer& transfer) const override;
  void promote(const std::shared_ptr<Transfer>& transfer) override;
  void cancel(const std::shared_ptr<Transfer>& transfer) override;
  // These two move the clock on to what they wait for.
  void drain(const std::shared_ptr<Transfer>& transfer) override;
  bool wait(Progress& progress, std::uint64_t seen, std::chrono::microseconds most) override;
  TransferStats stats() const override;

  // When the piece that is moving now will be there; none: the link is idle.
  std::optional<double> busy_until() const;
  // Moves the clock on by so many seconds in which the link stands still.
  void pause(double seconds);

 private:
  // What moves by itself, whoever looks.
  struct Link {
    std::deque<std::shared_ptr<Transfer>> demand;
    std::deque<std::shared_ptr<Transfer>> prefetch;
    std::shared_ptr<Transfer> moving;  // a piece of it; null: idle
    std::uint64_t moving_bytes = 0;
    double began = 0;
    double ends = 0;
    TransferStats stats;
  };
  void catch_up() const;
  void begin_next_piece(double time) const;

  const PieceSizes& sizes_;
  LinkCost cost_;
  Progress& progress_;
  VirtualClock& clock_;
  mutable Link link_;
};

}  // namespace moerun
