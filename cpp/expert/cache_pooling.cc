// The policy predictive: what stays is what will be used soonest, whatever its layer, and what the
// coming layers will probably use is read ahead, the earliest first.
#include <algorithm>
#include <utility>

#include "expert/expert_cache.h"

namespace moerun {
namespace {

// Reading ahead what is less likely than this delays what is needed more often than it helps.
constexpr double kLikely = 0.7;
// On the way at a time, of what is needed and of what is read ahead: enough to keep a link busy.
// What waits further back would only take the place of experts that may yet be used.
constexpr std::size_t kFewest = 4;
constexpr std::size_t kTogether = 2;
// Small experts come and go faster than anybody looks: so many bytes of them, but no more of the
// pool than this.
constexpr std::size_t kEnoughBytes = std::size_t{4} << 20;
constexpr std::size_t kSmallShare = 8;

std::size_t num_together(const CacheLayout& layout) {
  const std::size_t fewest = std::max(kFewest, layout.top_k);
  return std::max(fewest,
                  std::min(kEnoughBytes / layout.block_bytes, layout.num_blocks / kSmallShare));
}

}  // namespace

bool ExpertCache::is_predicting() const { return pool_ && defence_.wants_pool(); }

bool ExpertCache::wants_paths() const {
  const std::lock_guard lock(stats_mutex_);
  return is_predicting();
}

void ExpertCache::begin_pool_step(ForecastSource* forecasts) {
  follow_defence();
  next_use_->begin_step();
  stalled_seconds_ = 0;
  forecasts_ = is_predicting() ? forecasts : nullptr;
  knows_paths_ = forecasts_ != nullptr;
  if (!is_predicting()) return;
  list_expected();
  if (listen()) prefetch_into_pool();
}

// Whether there is news of the step.
bool ExpertCache::listen() {
  auto forecast = forecasts_ != nullptr ? forecasts_->poll() : std::nullopt;
  if (!forecast) return false;
  next_use_->expect(std::move(*forecast));
  list_expected();
  return true;
}

void ExpertCache::follow_defence() {
  const bool predicts = is_predicting();
  if (std::exchange(was_predicting_, predicts) && !predicts) trim_pool();
}

// Of the layers to come, what will probably be used; after the last one those of the next step.
void ExpertCache::list_expected() {
  candidates_.clear();
  if (layout_.prefetch == PrefetchMode::off) return;
  std::vector<std::pair<double, ExpertPool::Place>> expected;
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    for (std::size_t expert = 0; expert < layers_[layer].slot_of_expert.size(); ++expert) {
      if (next_use_->chance(layer, expert) < kLikely) continue;
      if (pool_->find({layer, expert}) != nullptr) continue;
      expected.push_back({next_use_->moment(layer, expert), {layer, expert}});
    }
  }
  std::stable_sort(expected.begin(), expected.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [moment, place] : expected) candidates_.push_back(place);
}

// What has failed is read again when it is needed; if that fails too, it is reported.
void ExpertCache::look_at_pool() {
  for (const ExpertPool::Place& place : pool_->look(*engine_)) let_go(place);
}

void ExpertCache::prefetch_into_pool() {
  look_at_pool();
  while (!candidates_.empty() && !has_waiting_demand_ &&
         pool_->num_on_the_way() < num_together(layout_)) {
    const ExpertPool::Place place = candidates_.back();
    LayerState& layer = layers_[place.layer];
    const bool is_leased = leased_layer_index_ == place.layer;
    if (pool_->find(place) != nullptr || is_leased) {
      candidates_.pop_back();
      continue;
    }
    auto transfer = submit(layer, place.expert, 0, std::nullopt, Urgency::prefetch);
    if (!transfer && make_room_ahead(place)) continue;
    if (!transfer) return;
    candidates_.pop_back();
    pool_->hold(place, {std::move(transfer)});
    ++layer.counters.prefetch_issued;
    note(CacheEventKind::prefetch, layer, place.expert);
  }
}

// What is computed once should stream through the places of a few, and no expert that is needed
// sooner than it should go for it; but the link may not stand still.
bool ExpertCache::make_room_for_demand(const ExpertLease& lease, std::size_t expert) {
  std::size_t num_demanded = 0;
  std::size_t num_passing = 0;
  for (const ExpertLease::Item& item : lease.items_) {
    if (!item.transfer || item.was_held) continue;
    ++num_passing;
    num_demanded += item.was_prefetched ? 0 : 1;
  }
  if (num_demanded < kTogether || num_passing < num_together(layout_)) {
    return make_room(std::nullopt);
  }
  return make_room(next_use_->moment(lease.layer_index_, expert));
}

// What is read ahead takes the place of what is not needed before the expert's own next turn; and
// of others only as far as reading further ahead has paid.
bool ExpertCache::make_room_ahead(ExpertPool::Place place) {
  if (pool_->num_unused() < depth_) return make_room(next_use_->moment(place.layer, place.expert));
  return make_room(next_use_->moment_after(place.layer, place.expert));
}

// Lets go of what will be used last, if that is after `moment`. Where the policy decides, only
// guesses make room, and that is not for here.
bool ExpertCache::make_room(std::optional<double> moment) {
  if (!is_predicting()) return false;
  const auto last = pool_->last_needed(*next_use_);
  if (!last) return false;
  if (moment && next_use_->moment(last->layer, last->expert) <= *moment) return false;
  let_go(*last);
  return true;
}

// Where the link is idle at times, and computing waits at others, reading further ahead helps;
// where it is always busy, every expert that goes for it is one more to be read.
void ExpertCache::choose_depth(double busy_share, double stalled_share) {
  constexpr double kBusy = 0.9;
  constexpr double kStalled = 0.02;
  if (busy_share > kBusy) {
    depth_ -= std::min<std::size_t>(depth_, 1);
  } else if (stalled_share > kStalled) {
    depth_ = std::min(depth_ + 1, layout_.num_blocks);
  }
}

void ExpertCache::let_go(ExpertPool::Place place) {
  const ExpertPool::Held held = pool_->take(place);
  LayerState& layer = layers_[place.layer];
  if (held.is_used) return note(CacheEventKind::evict, layer, place.expert);
  drop_prefetched({place.layer, place.expert, 0, held.transfer});
}

void ExpertCache::drop_unused(std::optional<std::size_t> layer_index) {
  for (const ExpertPool::Place& place : pool_->unused()) {
    if (!layer_index || place.layer == *layer_index) let_go(place);
  }
}

void ExpertCache::look_up_in_pool(LayerState& layer, ExpertLease& lease,
                                  std::span<const std::size_t> experts) {
  look_at_pool();
  const std::size_t index = lease.layer_index_;
  leased_layer_index_ = index;
  std::size_t num_hits = 0;
  for (const std::size_t expert : experts) {
    ExpertLease::Item item;
    item.expert = expert;
    ExpertPool::Held held = pool_->take({index, expert});
    item.was_held = held.is_used;
    item.was_prefetched = held.transfer && !held.is_used;
    num_hits += item.was_held ? 1 : 0;
    count_look_up(layer, lease, expert, item.was_held ? CacheEventKind::hit : CacheEventKind::miss);
    if (item.was_prefetched) {
      engine_->promote(held.transfer);
      ++(held.is_there ? layer.counters.prefetch_useful : layer.counters.prefetch_late);
      note(held.is_there ? CacheEventKind::prefetch_useful : CacheEventKind::prefetch_late, layer,
           expert);
    }
    item.transfer = std::move(held.transfer);
    lease.items_.push_back(std::move(item));
  }
  if (!is_predicting()) {  // guesses of this layer are of no use any more, right or wrong
    expected_.clear();
    drop_unused(index);
  }
  if (lease.mode_ == AccessMode::prefill) return;
  window_.record(index, experts, num_hits);
  next_use_->run(index, experts);
}

// What stays when it has been computed: all of it, for others to take its place when they need it;
// or where the policy decides, what it gives one of the layer's slots.
void ExpertCache::admit_to_pool(LayerState& layer, ExpertLease& lease) {
  layer.policy->begin_token();
  if (is_predicting()) {
    for (auto& item : lease.items_) {
      layer.policy->access(item.expert);
      item.stays = true;
    }
    if (lease.layer_index_ + 1 == layers_.size()) list_expected();
    return;
  }
  std::vector<std::size_t> others = pool_->used_experts(lease.layer_index_);
  std::size_t num_kept = others.size();
  for (const auto& item : lease.items_) num_kept += item.was_held ? 1 : 0;
  for (auto& item : lease.items_) {
    layer.policy->access(item.expert);
    item.stays = item.was_held;
    if (item.stays) continue;
    if (num_kept >= layout_.layers[lease.layer_index_].num_slots) {
      if (others.empty()) continue;
      const std::size_t victim = layer.policy->victim(others);
      std::erase(others, victim);
      let_go({lease.layer_index_, victim});
      --num_kept;
    }
    item.stays = true;
    ++num_kept;
  }
}

void ExpertCache::finish_pooled(const ExpertLease& lease, ExpertLease::Item& item) {
  LayerState& layer = layers_[lease.layer_index_];
  bool stays = item.stays;
  if (lease.mode_ == AccessMode::prefill) {
    // A prompt streams through what is free, and leaves the ring that a token needs. What it found
    // here comes back: no layer may end up with more than its slots.
    std::size_t num_kept = pool_->used_experts(lease.layer_index_).size();
    for (const auto& each : lease.items_) num_kept += each.was_held && !each.is_finished ? 1 : 0;
    stays = item.was_held || (ring_->num_free() > layout_.top_k &&
                              num_kept < layout_.layers[lease.layer_index_].num_slots);
  }
  if (!stays) return;
  if (!item.was_held) note(CacheEventKind::insert, layer, item.expert);
  pool_->hold({lease.layer_index_, item.expert},
              {std::move(item.transfer), /*is_used=*/true, /*is_there=*/true});
}

void ExpertCache::empty_pool() {
  candidates_.clear();
  drop_unused(std::nullopt);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    for (const std::size_t expert : pool_->used_experts(i)) let_go({i, expert});
  }
}

// What the policies would have kept: as many of each layer as it has slots.
void ExpertCache::trim_pool() {
  candidates_.clear();
  drop_unused(std::nullopt);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const auto experts = most_valued_first(*layers_[i].policy, pool_->used_experts(i));
    for (std::size_t j = layout_.layers[i].num_slots; j < experts.size(); ++j) {
      let_go({i, experts[j]});
    }
  }
}

}  // namespace moerun
