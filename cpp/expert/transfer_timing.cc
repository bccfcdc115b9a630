#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "base/error.h"
#include "expert/expert_cache.h"

namespace moerun {
namespace {

// How often a wait looks whether it should end.
constexpr std::chrono::milliseconds kInterval{100};
constexpr std::size_t kAsked = 65536;  // times

}  // namespace

// Who read for something dropped may hold its blocks for a moment longer.
void ExpertCache::wait_for_empty_ring(const std::function<void()>& while_waiting) {
  for (;;) {
    const std::uint64_t seen = progress_.now();
    if (ring_->try_take(layout_.num_blocks)) return;
    if (!engine_->wait(progress_, seen, kInterval) && while_waiting) while_waiting();
  }
}

TransferTiming ExpertCache::measure_transfers(std::size_t layer,
                                              std::span<const std::size_t> experts,
                                              std::size_t first_record,
                                              const std::function<void()>& while_waiting) {
  const LayerState& state = layers_[index_of(layer)];
  if (first_record >= state.num_records) {
    throw InvalidArgument(
        message("first_record: expected 0 to ", state.num_records - 1, ", found ", first_record));
  }
  for (const std::size_t expert : experts) {
    if (expert < state.slot_of_expert.size()) continue;
    throw InvalidArgument(
        message("experts: expected 0 to ", state.slot_of_expert.size() - 1, ", found ", expert));
  }
  const std::size_t blocks = (state.num_records - first_record + state.block_records - 1) /
                             std::max<std::size_t>(1, state.block_records);
  if (blocks * experts.size() > layout_.num_blocks) {
    throw InvalidArgument(message("experts: the staging ring holds only ",
                                  layout_.num_blocks / blocks, " of these ", experts.size()));
  }
  settle_transfers();  // the link is idle
  if (pool_) {
    const std::lock_guard lock(stats_mutex_);
    empty_pool();
  }
  wait_for_empty_ring(while_waiting);

  TransferTiming timing;
  std::vector<std::shared_ptr<Transfer>> transfers;
  const double begin = clock_.now();
  for (const std::size_t expert : experts) {
    auto transfer = submit(state, expert, first_record, std::nullopt, Urgency::demand);
    if (!transfer) throw Error("the staging ring was empty and has no room");
    transfers.push_back(std::move(transfer));
  }
  try {
    for (const auto& transfer : transfers) {
      for (std::size_t round = 1;; ++round) {
        const std::uint64_t seen = progress_.now();
        if (engine_->is_complete(*transfer)) break;
        // Nobody announces what a device has copied: it is asked all the time.
        const bool asks = copies_ != nullptr;
        const bool is_long =
            asks ? round % kAsked == 0 : !engine_->wait(progress_, seen, kInterval);
        if (is_long && while_waiting) while_waiting();
      }
    }
  } catch (...) {
    for (const auto& each : transfers) engine_->cancel(each);
    throw;
  }
  timing.seconds = clock_.now() - begin;
  for (const auto& transfer : transfers) {
    timing.num_pieces += transfer->num_pieces();
    timing.bytes += engine_->bytes_read(*transfer);
  }
  const std::lock_guard lock(stats_mutex_);
  is_between_steps_ = false;  // what was read now is of no token
  return timing;
}

}  // namespace moerun
