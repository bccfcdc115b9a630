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

}  // namespace

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
  for (const Prefetched& each : prefetched_) engine_->drain(each.transfer);  // the link is idle
  drop_all_prefetched();

  TransferTiming timing;
  std::vector<std::shared_ptr<Transfer>> transfers;
  const double begin = clock_.now();
  for (const std::size_t expert : experts) {
    auto transfer = submit(state, expert, first_record, std::nullopt, Urgency::demand);
    if (!transfer) {
      for (const auto& each : transfers) engine_->drain(each);
      throw InvalidArgument(message("experts: the staging ring holds only ", transfers.size(),
                                    " of these ", experts.size()));
    }
    transfers.push_back(std::move(transfer));
  }
  try {
    for (const auto& transfer : transfers) {
      for (;;) {
        const std::uint64_t seen = progress_.now();
        if (engine_->is_complete(*transfer)) break;
        // Nobody announces what a device has done: it is asked all the time.
        if (engine_->has_silent_progress()) continue;
        if (!engine_->wait(progress_, seen, kInterval) && while_waiting) while_waiting();
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
  is_between_tokens_ = false;  // what was read now is of no token
  return timing;
}

}  // namespace moerun
