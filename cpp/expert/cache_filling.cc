// What comes into slots without being asked for, and what is known about them.
#include <algorithm>
#include <chrono>
#include <deque>

#include "base/error.h"
#include "expert/expert_cache.h"

namespace moerun {
namespace {

// Enough to keep a link busy; what is interrupted waits for these at most.
constexpr std::size_t kTogether = 8;
// How often a wait looks whether it should end, and what a device has done, which nobody announces.
constexpr std::chrono::milliseconds kInterval{100};
constexpr std::chrono::microseconds kLook{50};

}  // namespace

CacheLayout ExpertCache::layout() const {
  const std::lock_guard lock(stats_mutex_);
  return layout_;
}

std::vector<std::uint16_t> ExpertCache::residents_of(std::size_t layer_index) const {
  std::vector<std::uint16_t> experts;
  if (pool_) {
    for (const std::size_t expert : pool_->used_experts(layer_index)) {
      experts.push_back(static_cast<std::uint16_t>(expert));
    }
    return experts;
  }
  for (const std::size_t expert : layers_[layer_index].expert_of_slot) {
    if (expert != kNone) experts.push_back(static_cast<std::uint16_t>(expert));
  }
  return experts;
}

std::vector<std::vector<std::size_t>> ExpertCache::residents() const {
  const std::lock_guard lock(stats_mutex_);
  std::vector<std::vector<std::size_t>> residents;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const auto experts = residents_of(i);
    residents.emplace_back(experts.begin(), experts.end());
    if (!experts.empty()) {
      residents.back() = most_valued_first(*layers_[i].policy, std::move(residents.back()));
    }
  }
  return residents;
}

std::uint64_t ExpertCache::decode_tokens() const {
  const std::lock_guard lock(stats_mutex_);
  return decode_tokens_;
}

RoutingHistory ExpertCache::routing_history() const {
  const std::lock_guard lock(stats_mutex_);
  return window_.copy();
}

WindowHits ExpertCache::window_hits() const {
  const std::lock_guard hits_lock(window_hits_mutex_);
  RoutingHistory history;
  std::vector<std::size_t> num_slots;
  std::uint64_t version = 0;
  {
    const std::lock_guard lock(stats_mutex_);
    version = window_.version();
    if (window_hits_ && window_hits_->first == version) return window_hits_->second;
    history = window_.copy();
    for (const LayerLayout& layer : layout_.layers) num_slots.push_back(layer.num_slots);
  }
  window_hits_.emplace(version, moerun::window_hits(history, num_slots));
  return window_hits_->second;
}

void ExpertCache::check_idle(const char* what) const {
  if (num_leases_ == 0) return;
  throw InvalidArgument(message(what, ": experts are being computed; expected a moment between ",
                                "tokens, when none is"));
}

void ExpertCache::plan_fills(std::size_t layer_index, std::span<const std::size_t> experts,
                             std::vector<SlotFill>& fills) const {
  const LayerState& layer = layers_[layer_index];
  std::vector<bool> is_taken(layer.expert_of_slot.size());
  std::vector<bool> is_there(layer.slot_of_expert.size());
  for (std::size_t slot = 0; slot < is_taken.size(); ++slot) {
    if (layer.expert_of_slot[slot] == kNone) continue;
    is_taken[slot] = true;
    is_there[layer.expert_of_slot[slot]] = true;
  }
  for (const SlotFill& planned : fills) {
    if (planned.layer_index != layer_index) continue;
    is_taken[planned.slot] = true;
    is_there[planned.expert] = true;
  }
  auto slot = is_taken.begin();
  for (const std::size_t expert : experts) {
    if (is_there[expert] || !layer.policy || !layer.policy->admits(expert)) continue;
    slot = std::find(slot, is_taken.end(), false);
    if (slot == is_taken.end()) return;
    *slot = true;
    is_there[expert] = true;
    fills.push_back({layer_index, expert, static_cast<std::size_t>(slot - is_taken.begin()), 0});
  }
}

std::uint64_t ExpertCache::warm(std::size_t layer, std::span<const std::size_t> experts,
                                const std::function<void()>& while_waiting) {
  check_idle("warm");
  const std::size_t index = index_of(layer);
  const std::size_t num_experts = layers_[index].slot_of_expert.size();
  for (const std::size_t expert : experts) {
    if (expert < num_experts) continue;
    throw InvalidArgument(message("warm: layer ", layer, ": expected experts from 0 to ",
                                  num_experts - 1, ", found ", expert));
  }
  std::vector<SlotFill> fills;
  plan_fills(index, experts, fills);
  return fill(fills, while_waiting);
}

std::uint64_t ExpertCache::fill(std::span<const SlotFill> fills,
                                const std::function<void()>& while_waiting) {
  struct Reading {
    const SlotFill* fill;
    std::shared_ptr<Transfer> transfer;
  };
  std::deque<Reading> reading;
  std::uint64_t bytes = 0;
  {
    const std::lock_guard lock(stats_mutex_);
    is_between_steps_ = false;  // what is read now is no token's
  }
  const auto start = [&](const SlotFill& fill) {
    const LayerState& layer = layers_[fill.layer_index];
    const std::size_t records = layer.top_records - fill.first_record;
    std::byte* target = slot(layer, fill.slot) + fill.first_record * layer.record_bytes;
    SegmentRead read{{layer.layer, fill.expert},
                     fill.first_record,
                     records,
                     {{fill.first_record, records, target}}};
    reading.push_back({&fill, engine_->submit(std::move(read), {}, Urgency::demand)});
  };
  const auto finish = [&](const Reading& done) {
    const std::lock_guard lock(stats_mutex_);
    LayerState& layer = layers_[done.fill->layer_index];
    layer.expert_of_slot[done.fill->slot] = done.fill->expert;
    layer.slot_of_expert[done.fill->expert] = done.fill->slot;
    if (done.fill->first_record == 0) {
      note(CacheEventKind::insert, layer, done.fill->expert);
      window_.offer(done.fill->layer_index, done.fill->expert);
    }
    const std::uint64_t read = engine_->bytes_read(*done.transfer);
    bytes += read;
    warm_bytes_ += read;
  };
  try {
    auto next = fills.begin();
    while (next != fills.end() || !reading.empty()) {
      if (while_waiting) while_waiting();
      while (next != fills.end() && reading.size() < kTogether) start(*next++);
      const std::uint64_t seen = progress_.now();
      if (engine_->is_usable(*reading.front().transfer)) {
        finish(reading.front());
        reading.pop_front();
      } else {
        engine_->wait(progress_, seen, engine_->has_silent_progress() ? kLook : kInterval);
      }
    }
    if (copies_) copies_->synchronize();  // what was issued is now there
  } catch (...) {
    for (const Reading& left : reading) {
      try {
        engine_->drain(left.transfer);  // it writes into the slot
      } catch (...) {  // the device has failed, and has said so to a call that can throw
      }
    }
    if (copies_) copies_->synchronize();
    throw;
  }
  return bytes;
}

}  // namespace moerun
