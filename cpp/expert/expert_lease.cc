#include <chrono>
#include <mutex>

#include "expert/expert_cache.h"

namespace moerun {
namespace {

// How often a wait looks whether it should end.
constexpr std::chrono::milliseconds kInterval{100};
// How often it looks what a device has done, which nobody announces.
constexpr std::chrono::microseconds kLook{50};

}  // namespace

ExpertLease::ExpertLease(ExpertCache& cache, std::size_t layer_index, AccessMode mode)
    : cache_(cache), layer_index_(layer_index), mode_(mode) {
  ++cache_.num_leases_;
}

ExpertLease::~ExpertLease() {
  const std::lock_guard lock(cache_.stats_mutex_);
  --cache_.num_leases_;
  auto& layer = cache_.layers_[layer_index_];
  for (Item& item : items_) {
    const bool is_done = item.is_finished || item.first_record == layer.num_records;
    if (is_done) continue;
    if (item.transfer && item.new_slot && !item.copies_to_slot) {
      try {
        cache_.engine_->drain(item.transfer);  // it writes into the slot
      } catch (...) {  // the device has failed, and has said so to a call that can throw
      }
    } else if (item.transfer) {
      cache_.engine_->cancel(item.transfer);
    }
    if (item.was_held) cache_.note(CacheEventKind::evict, layer, item.expert);
    if (item.new_slot) {
      cache_.note(CacheEventKind::evict, layer, item.expert);
      layer.expert_of_slot[*item.new_slot] = ExpertCache::kNone;
      layer.slot_of_expert[item.expert] = ExpertCache::kNone;
    }
  }
  cache_.has_waiting_demand_ = false;
  cache_.leased_layer_index_ = ExpertCache::kNone;
}

bool ExpertLease::next(std::vector<Segment>& segments, const std::function<void()>& while_waiting) {
  segments.clear();
  auto& layer = cache_.layers_[layer_index_];
  for (Item& item : items_) {
    if (item.is_rest_out && !item.is_finished) cache_.finish_item(layer, *this, item);
  }
  const auto prefetch_more = [this] {
    const std::lock_guard lock(cache_.stats_mutex_);
    cache_.continue_prefetch();
  };
  const auto start = [&](Item& item) {
    const std::lock_guard lock(cache_.stats_mutex_);
    return cache_.start(layer, *this, item);
  };
  const auto hand_out = [&](const Item& item, const RecordRun& run, std::uint64_t ready) {
    segments.push_back({item.expert,
                        run.first_record,
                        run.num_records,
                        {run.data, run.num_records * layer.record_bytes},
                        ready});
  };
  // What is resident, all at once, on the first call.
  for (Item& item : items_) {
    if (!item.top_slot || item.is_top_out) continue;
    item.is_top_out = true;
    hand_out(item, {0, layer.top_records, cache_.slot(layer, *item.top_slot)}, 0);
    if (item.first_record == layer.num_records) item.is_rest_out = true;
  }
  if (!segments.empty()) return true;

  for (;;) {
    const std::uint64_t seen = cache_.progress_.now();
    bool is_any_waiting = false;
    bool is_any_moving = false;
    for (Item& item : items_) {
      if (item.is_rest_out) continue;
      // In order: a small segment may not take the room that a larger one before it waits for.
      if (!item.transfer && (is_any_waiting || !start(item))) {
        is_any_waiting = true;
        continue;
      }
      if (!cache_.engine_->is_usable(*item.transfer)) {
        is_any_moving = true;
        continue;
      }
      item.is_rest_out = true;
      const std::uint64_t ready = cache_.engine_->ready(*item.transfer);
      for (const RecordRun& run : item.transfer->read().runs) hand_out(item, run, ready);
    }
    cache_.has_waiting_demand_ = is_any_waiting;
    prefetch_more();
    if (!segments.empty()) return true;
    if (!is_any_waiting && !is_any_moving) return false;
    // The ring is full of guesses about later layers: they make way.
    if (is_any_waiting && !is_any_moving) cache_.drop_all_prefetched();

    const double begin = cache_.clock_.now();
    const bool has_to_look = cache_.engine_->has_silent_progress();
    while (!cache_.engine_->wait(cache_.progress_, seen, has_to_look ? kLook : kInterval)) {
      if (while_waiting) while_waiting();
      if (has_to_look) break;
    }
    const double waited = cache_.clock_.now() - begin;
    waited_seconds_ += waited;
    if (mode_ == AccessMode::decode) {
      const std::lock_guard lock(cache_.stats_mutex_);
      layer.counters.stalled_seconds += waited;
      cache_.stalled_seconds_ += waited;
    }
  }
}

}  // namespace moerun
