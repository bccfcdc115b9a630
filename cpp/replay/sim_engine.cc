#include "replay/sim_engine.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "plan/cost_model.h"

namespace moerun {

void check_link_cost(const LinkCost& cost) {
  if (!is_rate(cost.bytes_per_s) || !is_cost(cost.fixed_s) || cost.channels == 0) {
    throw InvalidArgument(message("link_bytes_per_s and link_fixed_s: expected a rate of ",
                                  kMinBytesPerS, " to ", kMaxBytesPerS, " and at least 0 and at ",
                                  "most ", kMaxCostSeconds,
                                  " seconds over at least 1 channel, found ", cost.bytes_per_s,
                                  " and ", cost.fixed_s, " over ", cost.channels));
  }
}

SimEngine::SimEngine(const PieceSizes& sizes, const LinkCost& cost, Progress& progress,
                     VirtualClock& clock)
    : sizes_(sizes), cost_(cost), progress_(progress), clock_(clock) {
  check_link_cost(cost);
}

void SimEngine::begin_pieces(double time) const {
  for (auto* queue : {&link_.demand, &link_.prefetch}) {
    while (!queue->empty() && link_.moving.size() < cost_.channels) {
      Piece piece;
      piece.transfer = queue->front();
      Transfer& transfer = *piece.transfer;
      if (transfer.next_piece_ + 1 >= transfer.num_pieces_) queue->pop_front();
      piece.bytes = sizes_.piece_bytes(transfer.read(), transfer.next_piece_++);
      link_.bytes_end = std::max(time + cost_.fixed_s, link_.bytes_end) +
                        static_cast<double>(piece.bytes) / cost_.bytes_per_s;
      piece.ends = link_.bytes_end;
      if (link_.moving.empty()) link_.busy_since = time;
      link_.moving.push_back(std::move(piece));
    }
  }
}

void SimEngine::catch_up() const {
  while (!link_.moving.empty() && link_.moving.front().ends <= clock_.now()) {
    Piece piece = std::move(link_.moving.front());
    link_.moving.pop_front();
    Transfer& transfer = *piece.transfer;
    ++transfer.num_done_;
    transfer.bytes_ += piece.bytes;
    link_.stats.bytes += piece.bytes;
    if (link_.moving.empty()) link_.stats.busy_seconds += piece.ends - link_.busy_since;
    const bool is_over = transfer.num_done_ == transfer.num_pieces_ || transfer.is_cancelled_;
    piece.transfer.reset();  // may give blocks back, which announces progress by itself
    if (is_over) progress_.announce();
    begin_pieces(piece.ends);
  }
}

std::shared_ptr<Transfer> SimEngine::submit(SegmentRead read, StagingBlocks blocks,
                                            Urgency urgency) {
  catch_up();
  auto transfer = std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  transfer->num_pieces_ = sizes_.num_pieces(transfer->read());
  (urgency == Urgency::demand ? link_.demand : link_.prefetch).push_back(transfer);
  begin_pieces(clock_.now());
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
  double ends = clock_.now();
  for (const Piece& piece : link_.moving) {
    if (piece.transfer == transfer) ends = piece.ends;
  }
  clock_.advance_to(ends);
  catch_up();
}

bool SimEngine::wait(Progress& progress, std::uint64_t seen, std::chrono::microseconds) {
  catch_up();
  if (progress.now() != seen) return true;
  if (link_.moving.empty()) {
    throw Error("the simulation is stuck: something waits for an idle link");
  }
  clock_.advance_to(link_.moving.front().ends);
  catch_up();
  return true;
}

std::optional<double> SimEngine::busy_until() const {
  catch_up();
  if (link_.moving.empty()) return std::nullopt;
  return link_.moving.front().ends;
}

void SimEngine::pause(double seconds) {
  catch_up();
  for (Piece& piece : link_.moving) piece.ends += seconds;
  link_.bytes_end += seconds;
  link_.busy_since += seconds;
  clock_.advance(seconds);
}

TransferStats SimEngine::stats() const {
  catch_up();
  TransferStats stats = link_.stats;
  if (!link_.moving.empty()) stats.busy_seconds += clock_.now() - link_.busy_since;
  return stats;
}

}  // namespace moerun
