#include "replay/sim_engine.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"

namespace moerun {

void check_link_cost(const LinkCost& cost) {
  const bool is_sound = std::isfinite(cost.fixed_s) && cost.fixed_s >= 0 &&
                        std::isfinite(cost.bytes_per_s) && cost.bytes_per_s > 0;
  if (!is_sound) {
    throw InvalidArgument(message("link_bytes_per_s and link_fixed_s: expected a rate above 0 and ",
                                  "at least 0 seconds, found ", cost.bytes_per_s, " and ",
                                  cost.fixed_s));
  }
}

SimEngine::SimEngine(const PieceSizes& sizes, const LinkCost& cost, Progress& progress,
                     VirtualClock& clock)
    : sizes_(sizes), cost_(cost), progress_(progress), clock_(clock) {
  check_link_cost(cost);
}

void SimEngine::begin_next_piece(double time) const {
  for (auto* queue : {&link_.demand, &link_.prefetch}) {
    if (queue->empty()) continue;
    link_.moving = queue->front();
    Transfer& transfer = *link_.moving;
    if (transfer.next_piece_ + 1 >= transfer.num_pieces_) queue->pop_front();
    link_.moving_bytes = sizes_.piece_bytes(transfer.read(), transfer.next_piece_++);
    link_.began = time;
    link_.ends = time + cost_.fixed_s + static_cast<double>(link_.moving_bytes) / cost_.bytes_per_s;
    return;
  }
}

void SimEngine::catch_up() const {
  while (link_.moving && link_.ends <= clock_.now()) {
    Transfer& transfer = *link_.moving;
    ++transfer.num_done_;
    transfer.bytes_ += link_.moving_bytes;
    link_.stats.bytes += link_.moving_bytes;
    link_.stats.busy_seconds += link_.ends - link_.began;
    const bool is_over = transfer.num_done_ == transfer.num_pieces_ || transfer.is_cancelled_;
    link_.moving.reset();  // may give blocks back, which announces progress by itself
    if (is_over) progress_.announce();
    begin_next_piece(link_.ends);
  }
}

std::shared_ptr<Transfer> SimEngine::submit(SegmentRead read, StagingBlocks blocks,
                                            Urgency urgency) {
  catch_up();
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  transfer->num_pieces_ = sizes_.num_pieces(transfer->read());
  (urgency == Urgency::demand ? link_.demand : link_.prefetch).push_back(transfer);
  if (!link_.moving) begin_next_piece(clock_.now());
  return transfer;
}

bool SimEngine::is_complete(const Transfer& transfer) {
  catch_up();
  return transfer.num_done_ == transfer.num_pieces_;
}

std::uint64_t SimEngine::bytes_read(const Transfer& transfer) const {
  catch_up();
  return transfer.bytes_;
}

void SimEngine::promote(const std::shared_ptr<Transfer>& transfer) {
  catch_up();
  transfer->urgency_ = Urgency::demand;
  if (std::erase(link_.prefetch, transfer) != 0) link_.demand.push_back(transfer);
}

void SimEngine::cancel(const std::shared_ptr<Transfer>& transfer) {
  catch_up();
  transfer->is_cancelled_ = true;
  std::erase(link_.demand, transfer);
  std::erase(link_.prefetch, transfer);
}

void SimEngine::drain(const std::shared_ptr<Transfer>& transfer) {
  cancel(transfer);
  if (link_.moving == transfer) clock_.advance_to(link_.ends);
  catch_up();
}

bool SimEngine::wait(Progress& progress, std::uint64_t seen, std::chrono::microseconds) {
  catch_up();
  if (progress.now() != seen) return true;
  if (!link_.moving) throw Error("the simulation is stuck: something waits for an idle link");
  clock_.advance_to(link_.ends);
  catch_up();
  return true;
}

std::optional<double> SimEngine::busy_until() const {
  catch_up();
  return link_.moving ? std::optional(link_.ends) : std::nullopt;
}

void SimEngine::pause(double seconds) {
  catch_up();
  link_.began += seconds;
  link_.ends += seconds;
  clock_.advance(seconds);
}

TransferStats SimEngine::stats() const {
  catch_up();
  TransferStats stats = link_.stats;
  if (link_.moving) stats.busy_seconds += clock_.now() - link_.began;
  return stats;
}

}  // namespace moerun
