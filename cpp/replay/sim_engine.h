// The transfer engine of a simulation: one link, on virtual time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>

#include "base/clock.h"
#include "expert/transfer_engine.h"

namespace moerun {

// A piece takes fixed_s, and then its bytes theirs. So many pieces are under way at once: their
// fixed times run beside each other, their bytes take turns.
struct LinkCost {
  double fixed_s = 0;
  double bytes_per_s = 0;
  std::size_t channels = 1;
};

// InvalidArgument for a link that takes negative time or has no rate.
void check_link_cost(const LinkCost& cost);

// Moves pieces in the order of ReaderEngine: demand before prefetch, within one kind first come,
// first served; a channel is one of its threads. The link runs on while nobody looks: every call
// brings it up to the clock. For one thread.
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

  // When the next piece will be there; none: the link is idle.
  std::optional<double> busy_until() const;
  // Moves the clock on by so many seconds in which the link stands still.
  void pause(double seconds);

 private:
  struct Piece {
    std::shared_ptr<Transfer> transfer;
    std::uint64_t bytes = 0;
    double ends = 0;
  };
  // What moves by itself, whoever looks.
  struct Link {
    std::deque<std::shared_ptr<Transfer>> demand;
    std::deque<std::shared_ptr<Transfer>> prefetch;
    std::deque<Piece> moving;  // one a channel, in the order of their ends
    double bytes_end = 0;      // of the last piece's
    double busy_since = 0;
    TransferStats stats;
  };
  void catch_up() const;
  void begin_pieces(double time) const;

  const PieceSizes& sizes_;
  LinkCost cost_;
  Progress& progress_;
  VirtualClock& clock_;
  mutable Link link_;
};

}  // namespace moerun
