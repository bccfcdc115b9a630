// Other slots in the same arena, while the model stays loaded.
#include <algorithm>
#include <chrono>
#include <utility>

#include "base/bytes_text.h"
#include "base/error.h"
#include "expert/expert_cache.h"

namespace moerun {
namespace {

constexpr std::chrono::milliseconds kInterval{100};

bool is_admitted(const CacheLayout& layout, const LayerLayout& layer, std::size_t expert) {
  const auto& listed = layer.static_experts;
  return layout.policy != "static" ||
         std::find(listed.begin(), listed.end(), expert) != listed.end();
}

}  // namespace

void ExpertCache::check_next(const CacheLayout& next) const {
  if (next.is_resident) {
    throw InvalidArgument(
        "reconfigure: the plan keeps every expert in memory, but the model was loaded with a "
        "cache; load it again with that plan");
  }
  if (next.policy != layout_.policy) {
    throw InvalidArgument(
        message("reconfigure: expected the policy that the model was loaded with, ", layout_.policy,
                ", found ", next.policy, "; load it again for another policy"));
  }
  const auto is_same = [](const LayerLayout& a, const LayerLayout& b) {
    return a.layer == b.layer;
  };
  const bool is_same_ring = next.num_blocks == layout_.num_blocks || layout_.is_pool;
  if (next.block_bytes != layout_.block_bytes || !is_same_ring ||
      !std::equal(next.layers.begin(), next.layers.end(), layout_.layers.begin(),
                  layout_.layers.end(), is_same)) {
    throw InvalidArgument("reconfigure: the layout is of another model");
  }
  if (next.arena_bytes() > arena_bytes_) {
    throw OutOfMemory(message(
        "reconfigure: the plan needs ", bytes_text(next.arena_bytes(), Rounding::up), " (slots ",
        bytes_text(next.slot_bytes()), ", staging ring ", bytes_text(next.ring_bytes()),
        "), but the model was loaded with ", bytes_text(arena_bytes_, Rounding::down),
        " for experts, which do not grow; plan for ", bytes_text(arena_bytes_, Rounding::down),
        ", or load it again with a larger budget"));
  }
}

// From here on nothing writes to the arena.
void ExpertCache::settle_transfers() {
  std::vector<std::shared_ptr<Transfer>> dropped;
  for (const Prefetched& prefetched : prefetched_) dropped.push_back(prefetched.transfer);
  if (pool_) {
    const std::lock_guard lock(stats_mutex_);
    for (const auto& place : pool_->unused()) dropped.push_back(pool_->find(place)->transfer);
  }
  drop_all_prefetched();
  for (const auto& transfer : dropped) engine_->drain(transfer);
  if (copies_) copies_->synchronize();
}

// By the place of their data.
std::vector<ExpertCache::Kept> ExpertCache::choose_kept(const CacheLayout& next) const {
  std::vector<Kept> kept;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const LayerState& layer = layers_[i];
    const LayerLayout& to = next.layers[i];
    const std::size_t records = std::min(layer.top_records, to.top_records);
    if (records == 0) continue;
    std::vector<std::size_t> experts;
    for (const std::size_t expert : layer.expert_of_slot) {
      if (expert != kNone && is_admitted(next, to, expert)) experts.push_back(expert);
    }
    if (experts.size() > to.num_slots) {
      experts = most_valued_first(*layer.policy, std::move(experts));
      experts.resize(to.num_slots);
    }
    const auto slot_of = [&](std::size_t expert) { return layer.slot_of_expert[expert]; };
    std::sort(experts.begin(), experts.end(),
              [&](std::size_t a, std::size_t b) { return slot_of(a) < slot_of(b); });
    for (std::size_t place = 0; place < experts.size(); ++place) {
      kept.push_back({i, experts[place], place, records, records * layer.record_bytes,
                      slot(layer, slot_of(experts[place]))});
    }
  }
  return kept;
}

// All slots are empty then.
void ExpertCache::adopt(const CacheLayout& next) {
  for (LayerState& layer : layers_) {  // before anything can throw
    std::fill(layer.slot_of_expert.begin(), layer.slot_of_expert.end(), kNone);
    layer.expert_of_slot.clear();
  }
  const std::size_t budget_bytes = layout_.budget_bytes;
  const std::size_t num_blocks = layout_.num_blocks;
  layout_ = next;
  layout_.budget_bytes = budget_bytes;  // what was granted
  layout_.num_blocks = num_blocks;
  std::byte* slots = arena_->data() + layout_.ring_bytes();
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const LayerLayout& to = layout_.layers[i];
    LayerState& layer = layers_[i];
    layer.top_records = to.top_records;
    layer.slot_bytes = to.slot_bytes;
    layer.slots = slots;
    slots += to.num_slots * to.slot_bytes;
    layer.expert_of_slot.assign(layout_.is_pool ? 0 : to.num_slots, kNone);
    if (layout_.policy == "static") {  // another list
      PolicyParams params;
      params.static_experts = to.static_experts;
      auto policy = make_cache_policy(layout_.policy, layer.slot_of_expert.size(), params);
      policy->inherit(*layer.policy);
      layer.policy = std::move(policy);
    }
  }
  defence_.restart(layout_);
  window_.restart();
  ++num_reconfigured_;
}

// Copies within the arena whose ends may overlap: those are cut so that no copy does, or, where
// that would make crumbs, go through a block of the ring.
void ExpertCache::move_left(std::byte* target, const std::byte* source, std::size_t bytes,
                            std::byte* bounce) {
  const auto distance = static_cast<std::size_t>(source - target);
  if (distance == 0) return;
  const bool is_far = distance >= layout_.block_bytes;
  const std::size_t step = is_far ? distance : layout_.block_bytes;
  for (std::size_t done = 0; done < bytes; done += step) {
    const std::size_t count = std::min(step, bytes - done);
    if (!is_far) backend_.copy(*compute_, bounce, source + done, count);
    backend_.copy(*compute_, target + done, is_far ? source + done : bounce, count);
  }
}

void ExpertCache::move_right(std::byte* target, const std::byte* source, std::size_t bytes,
                             std::byte* bounce) {
  const auto distance = static_cast<std::size_t>(target - source);
  if (distance == 0) return;
  const bool is_far = distance >= layout_.block_bytes;
  const std::size_t step = is_far ? distance : layout_.block_bytes;
  for (std::size_t left = bytes; left > 0;) {
    const std::size_t count = std::min(step, left);
    left -= count;
    if (!is_far) backend_.copy(*compute_, bounce, source + left, count);
    backend_.copy(*compute_, target + left, is_far ? source + left : bounce, count);
  }
}

// There is no second arena: first everything goes to the left, without gaps, so that no target lies
// to the right of its source; then, from the last to the first, to its place, which is never to the
// left of that.
void ExpertCache::move(std::vector<Kept>& kept) {
  std::optional<StagingBlocks> block;
  for (;;) {  // a piece of something dropped may still be read
    const std::uint64_t seen = progress_.now();
    block = ring_->try_take(1);
    if (block) break;
    engine_->wait(progress_, seen, kInterval);
  }
  std::byte* bounce = ring_->block(block->indices().front());
  std::byte* packed = arena_->data() + layout_.ring_bytes();
  for (Kept& each : kept) {
    move_left(packed, each.data, each.bytes, bounce);
    each.data = packed;
    packed += each.bytes;
  }
  for (auto each = kept.rbegin(); each != kept.rend(); ++each) {
    move_right(slot(layers_[each->layer_index], each->slot), each->data, each->bytes, bounce);
  }
  compute_->synchronize();
}

Reconfiguration ExpertCache::reconfigure(const CacheLayout& next,
                                         const std::function<void()>& while_waiting) {
  check_idle("reconfigure");
  check_next(next);
  settle_transfers();
  Reconfiguration changes;
  std::vector<Kept> kept = choose_kept(next);
  std::vector<std::vector<bool>> stays;  // [layer][expert]
  for (const LayerState& layer : layers_) stays.emplace_back(layer.slot_of_expert.size(), false);
  for (const Kept& each : kept) stays[each.layer_index][each.expert] = true;
  {
    const std::lock_guard lock(stats_mutex_);
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const LayerLayout& before = layout_.layers[i];
      const LayerLayout& to = next.layers[i];
      changes.layers.push_back(
          {to.layer, before.num_slots, to.num_slots, before.split, to.split, 0, 0, 0});
      for (const std::size_t expert : layers_[i].expert_of_slot) {
        if (expert == kNone) continue;
        ++(stays[i][expert] ? changes.layers[i].kept : changes.layers[i].dropped);
        if (!stays[i][expert]) note(CacheEventKind::evict, layers_[i], expert);
      }
    }
    adopt(next);
  }
  if (!kept.empty()) move(kept);

  std::vector<SlotFill> fills;
  {
    const std::lock_guard lock(stats_mutex_);
    for (const Kept& each : kept) {
      LayerState& layer = layers_[each.layer_index];
      if (each.records < layer.top_records) {
        fills.push_back({each.layer_index, each.expert, each.slot, each.records});
        continue;
      }
      layer.expert_of_slot[each.slot] = each.expert;
      layer.slot_of_expert[each.expert] = each.slot;
    }
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    if (layers_[i].expert_of_slot.empty()) continue;
    plan_fills(i, next.layers[i].warm_experts, fills);
    std::vector<std::size_t> seen;
    for (std::size_t expert = 0; expert < layers_[i].slot_of_expert.size(); ++expert) {
      if (layers_[i].policy->has_seen(expert)) seen.push_back(expert);
    }
    plan_fills(i, most_valued_first(*layers_[i].policy, std::move(seen)), fills);
  }
  for (const SlotFill& each : fills) {
    if (each.first_record == 0) ++changes.layers[each.layer_index].warmed;
  }
  try {
    changes.bytes_read = fill(fills, while_waiting);
  } catch (...) {
    const std::lock_guard lock(stats_mutex_);
    for (const Kept& each : kept) {
      const LayerState& layer = layers_[each.layer_index];
      if (layer.slot_of_expert[each.expert] == kNone) {
        note(CacheEventKind::evict, layer, each.expert);
      }
    }
    throw;
  }
  return changes;
}

}  // namespace moerun
