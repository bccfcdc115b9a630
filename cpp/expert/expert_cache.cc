#include "expert/expert_cache.h"

#include <algorithm>
#include <utility>

#include "base/cpu_features.h"
#include "base/error.h"
#include "expert/copy_engine.h"
#include "expert/reader_engine.h"

namespace moerun {
namespace {

constexpr int kDiskThreads = 2;
// What decides where predictions do not pay.
constexpr std::string_view kFallback = "lcp";

// One core copies slower than a link takes it; the others have little else to do.
int num_copying_threads() { return std::clamp(num_usable_cpus() / 2, kDiskThreads, 8); }

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

}  // namespace

ExpertCache::ExpertCache(const ModelWeights& weights, CacheLayout layout, const ExpertStore* store,
                         const HostMemoryTiers* host, const ExpertCacheOptions& options,
                         TraceSink* sink, Backend& backend)
    : layout_(std::move(layout)),
      sink_(sink),
      store_(store),
      backend_(backend),
      clock_(options.stand_ins.clock != nullptr ? *options.stand_ins.clock : steady_clock_),
      arena_(backend.allocate(layout_.arena_bytes(), "the expert cache", MemoryUse::streamed)),
      arena_bytes_(layout_.arena_bytes()),
      window_(layout_.layers.size(), layout_.top_k),
      defence_(layout_, options, sink != nullptr) {
  ring_.emplace(Bytes{arena_->data(), layout_.ring_bytes()}, layout_.block_bytes, progress_);
  std::byte* slots = arena_->data() + layout_.ring_bytes();
  if (layout_.is_pool) {
    const std::size_t num_experts =
        weights.layers[layout_.layers.front().layer].experts.num_experts;
    pool_.emplace(layout_.layers.size(), num_experts);
    next_use_.emplace(layout_.layers.size(), num_experts);
  }
  for (const LayerLayout& from : layout_.layers) {
    const LayerWeights& layer = weights.layers[from.layer];
    LayerState state;
    state.layer = from.layer;
    state.num_records = layer.experts.intermediate_size;
    state.record_bytes = layer.record_bytes();
    state.block_records =
        layout_.block_bytes / (state.record_bytes * kQuantumRecords) * kQuantumRecords;
    state.top_records = from.top_records;
    state.slot_bytes = from.slot_bytes;
    state.slots = slots;
    slots += from.num_slots * from.slot_bytes;
    state.expert_of_slot.assign(layout_.is_pool ? 0 : from.num_slots, kNone);
    state.slot_of_expert.assign(layer.experts.num_experts, kNone);
    if (layout_.policy != "off") {
      PolicyParams params;
      params.static_experts = from.static_experts;
      state.policy = options.stand_ins.make_policy
                         ? options.stand_ins.make_policy(from.layer)
                         : make_cache_policy(layout_.is_pool ? kFallback : layout_.policy,
                                             layer.experts.num_experts, params);
    }
    layers_.push_back(std::move(state));
  }
  if (options.stand_ins.make_engine) {
    engine_ = options.stand_ins.make_engine(progress_);
    return;
  }
  const int threads = options.reader_threads != 0 ? options.reader_threads
                      : host != nullptr           ? num_copying_threads()
                                                  : kDiskThreads;
  if (host == nullptr) {
    engine_ = std::make_unique<ReaderEngine>(*store, progress_, threads);
    return;
  }
  std::unique_ptr<HostStage> stage;
  if (store != nullptr) {
    stage =
        std::make_unique<HostStage>(weights, *store, Bytes{host->ring->data(), host->ring->size()},
                                    host->plan.ring_block_bytes, progress_, threads);
  }
  copies_ = backend.make_copy_queue();
  engine_ = std::make_unique<CopyEngine>(weights, *host->experts, *copies_, std::move(stage));
}

void ExpertCache::begin_pass(Stream& compute) {
  compute_ = &compute;
  forecasts_ = nullptr;  // of a step that was cut off
  engine_->begin_pass(compute);
}

std::size_t ExpertCache::index_of(std::size_t layer) const {
  const auto found = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const auto& state) { return state.layer == layer; });
  if (found == layers_.end()) {
    throw InvalidArgument(message("layer ", layer, " has no experts"));
  }
  return static_cast<std::size_t>(found - layers_.begin());
}

void ExpertCache::note(CacheEventKind kind, const LayerState& layer, std::size_t expert) {
  if (sink_ != nullptr) sink_->record({decode_tokens_, layer.layer, expert, kind});
}

std::unique_ptr<ExpertLease> ExpertCache::acquire(std::size_t layer,
                                                  std::span<const std::size_t> experts,
                                                  AccessMode mode) {
  std::unique_ptr<ExpertLease> lease(new ExpertLease(*this, index_of(layer), mode));
  const std::lock_guard lock(stats_mutex_);
  LayerState& state = layers_[lease->layer_index_];
  const bool uses_slots = mode == AccessMode::prefill || defence_.wants_slots();
  bool has_news = false;
  if (pool_) {
    follow_defence();
    has_news = listen();
    look_up_in_pool(state, *lease, experts);
    if (mode == AccessMode::decode) admit_to_pool(state, *lease);
  } else {
    look_up(state, *lease, experts, uses_slots);
    adopt_prefetched(lease->layer_index_, *lease);
    if (state.policy && mode == AccessMode::decode) admit(state, *lease, uses_slots);
    if (state.policy && mode == AccessMode::prefill) admit_to_empty_slots(state, *lease);
  }
  has_waiting_demand_ = false;
  if (mode == AccessMode::prefill) is_between_steps_ = false;
  if (mode == AccessMode::prefill) window_.forget_guess(lease->layer_index_);
  for (auto& item : lease->items_) {
    if (item.first_record == state.num_records || item.transfer || has_waiting_demand_) continue;
    has_waiting_demand_ = !start(state, *lease, item);
  }
  if (has_news) prefetch_into_pool();  // after what is needed at once
  return lease;
}

void ExpertCache::look_up(LayerState& layer, ExpertLease& lease,
                          std::span<const std::size_t> experts, bool uses_slots) {
  std::size_t num_hits = 0;
  for (const std::size_t expert : experts) {
    ExpertLease::Item item;
    item.expert = expert;
    const std::size_t slot = layer.slot_of_expert[expert];
    CacheEventKind kind = CacheEventKind::miss;
    if (slot != kNone && uses_slots) {
      item.top_slot = slot;
      item.first_record = layer.top_records;
      kind = layer.top_records == layer.num_records ? CacheEventKind::hit : CacheEventKind::top_hit;
      ++num_hits;
    }
    count_look_up(layer, lease, expert, kind);
    lease.items_.push_back(std::move(item));
  }
  if (lease.mode_ == AccessMode::decode) window_.record(lease.layer_index_, experts, num_hits);
}

void ExpertCache::count_look_up(LayerState& layer, const ExpertLease& lease, std::size_t expert,
                                CacheEventKind kind) {
  if (lease.mode_ != AccessMode::decode) return;
  ++layer.counters.lookups;
  ++(kind == CacheEventKind::hit       ? layer.counters.hits
     : kind == CacheEventKind::top_hit ? layer.counters.top_hits
                                       : layer.counters.misses);
  note(kind, layer, expert);
}

void ExpertCache::adopt_prefetched(std::size_t layer_index, ExpertLease& lease) {
  LayerState& layer = layers_[layer_index];
  expected_.clear();
  // Taken out first: whatever happens, none is adopted twice.
  for (const Prefetched& prefetched : std::exchange(prefetched_, {})) {
    ExpertLease::Item* wanted = nullptr;
    if (prefetched.layer_index == layer_index) {
      for (auto& item : lease.items_) {
        if (item.expert == prefetched.expert && item.first_record == prefetched.first_record) {
          wanted = &item;
        }
      }
    }
    bool is_there = false;
    try {
      is_there = wanted != nullptr && engine_->is_complete(*prefetched.transfer);
    } catch (const std::exception&) {
      wanted = nullptr;  // read again, as demand; if that fails too, it is reported
    }
    if (wanted == nullptr) {
      drop_prefetched(prefetched);
      continue;
    }
    engine_->promote(prefetched.transfer);
    wanted->transfer = prefetched.transfer;
    wanted->was_prefetched = true;
    ++(is_there ? layer.counters.prefetch_useful : layer.counters.prefetch_late);
    note(is_there ? CacheEventKind::prefetch_useful : CacheEventKind::prefetch_late, layer,
         prefetched.expert);
  }
}

void ExpertCache::drop_prefetched(const Prefetched& dropped) {
  LayerState& layer = layers_[dropped.layer_index];
  engine_->cancel(dropped.transfer);
  ++layer.counters.prefetch_wasted;
  const std::uint64_t bytes = engine_->bytes_read(*dropped.transfer);
  layer.counters.prefetch_bytes += bytes;
  layer.counters.wasted_bytes += bytes;
  note(CacheEventKind::prefetch_wasted, layer, dropped.expert);
}

void ExpertCache::drop_all_prefetched() {
  const std::lock_guard lock(stats_mutex_);
  expected_.clear();
  for (const Prefetched& prefetched : std::exchange(prefetched_, {})) drop_prefetched(prefetched);
  if (!pool_) return;
  candidates_.clear();
  drop_unused(std::nullopt);
}

void ExpertCache::take_slot(LayerState& layer, ExpertLease::Item& item, std::size_t slot) {
  layer.expert_of_slot[slot] = item.expert;
  layer.slot_of_expert[item.expert] = slot;
  item.new_slot = slot;
  item.copies_to_slot = item.transfer != nullptr;
  note(CacheEventKind::insert, layer, item.expert);
}

void ExpertCache::admit(LayerState& layer, ExpertLease& lease, bool uses_slots) {
  layer.policy->begin_token();
  const auto is_leased = [&](std::size_t expert) {
    return std::any_of(lease.items_.begin(), lease.items_.end(), [&](const auto& item) {
      return item.expert == expert && (item.top_slot || item.new_slot);
    });
  };
  for (auto& item : lease.items_) {
    layer.policy->access(item.expert);  // it learns also while the slots are not used
    if (!uses_slots || item.top_slot || !layer.policy->admits(item.expert)) continue;
    std::vector<std::size_t> candidates;
    std::optional<std::size_t> slot;
    for (std::size_t i = 0; i < layer.expert_of_slot.size() && !slot; ++i) {
      const std::size_t expert = layer.expert_of_slot[i];
      if (expert == kNone) {
        slot = i;
      } else if (!is_leased(expert)) {
        candidates.push_back(expert);
      }
    }
    if (!slot && candidates.empty()) continue;
    if (!slot) {
      const std::size_t victim = layer.policy->victim(candidates);
      slot = layer.slot_of_expert[victim];
      layer.slot_of_expert[victim] = kNone;
      note(CacheEventKind::evict, layer, victim);
    }
    take_slot(layer, item, *slot);
  }
}

void ExpertCache::admit_to_empty_slots(LayerState& layer, ExpertLease& lease) {
  auto item = lease.items_.begin();
  for (std::size_t slot = 0; slot < layer.expert_of_slot.size(); ++slot) {
    if (layer.expert_of_slot[slot] != kNone) continue;
    while (item != lease.items_.end() && (item->top_slot || !layer.policy->admits(item->expert))) {
      ++item;
    }
    if (item == lease.items_.end()) return;
    window_.offer(lease.layer_index_, item->expert);
    take_slot(layer, *item++, slot);
  }
}

std::shared_ptr<Transfer> ExpertCache::submit(const LayerState& layer, std::size_t expert,
                                              std::size_t first_record,
                                              std::optional<std::size_t> to_slot, Urgency urgency) {
  SegmentRead read{{layer.layer, expert}, first_record, layer.num_records - first_record, {}};
  std::size_t record = first_record;
  if (to_slot) {
    read.runs.push_back({0, layer.top_records, slot(layer, *to_slot)});
    record = layer.top_records;
  }
  auto blocks = ring_->try_take(divide_up(layer.num_records - record, layer.block_records));
  if (!blocks) return nullptr;
  std::size_t previous = kNone;
  for (const std::size_t index : blocks->indices()) {
    const std::size_t count = std::min(layer.block_records, layer.num_records - record);
    const bool touches = previous != kNone && index == previous + 1 &&
                         layer.block_records * layer.record_bytes == layout_.block_bytes;
    if (touches) {
      read.runs.back().num_records += count;
    } else {
      read.runs.push_back({record, count, ring_->block(index)});
    }
    previous = index;
    record += count;
  }
  return engine_->submit(std::move(read), std::move(*blocks), urgency);
}

bool ExpertCache::start(const LayerState& layer, const ExpertLease& lease,
                        ExpertLease::Item& item) {
  do {
    item.transfer = submit(layer, item.expert, item.first_record, item.new_slot, Urgency::demand);
  } while (!item.transfer && pool_ && make_room_for_demand(lease, item.expert));
  return item.transfer != nullptr;
}

bool ExpertCache::wants_prefetch() const {
  // Whole paths are known, and further ahead than the next layer's router sees.
  if (pool_ && knows_paths_ && defence_.wants_pool()) return false;
  return defence_.wants_prefetch();
}

void ExpertCache::prefetch(std::size_t layer, std::span<const std::size_t> experts) {
  const std::lock_guard lock(stats_mutex_);
  expected_layer_index_ = index_of(layer);
  window_.guess(expected_layer_index_, experts);
  if (is_predicting()) {
    next_use_->expect(expected_layer_index_, experts);
    list_expected();
  } else {
    expected_.assign(experts.rbegin(), experts.rend());
  }
  continue_prefetch();
}

void ExpertCache::continue_prefetch() {
  if (is_predicting()) return prefetch_into_pool();
  while (!expected_.empty() && !has_waiting_demand_) {
    LayerState& state = layers_[expected_layer_index_];
    const std::size_t expert = expected_.back();
    const bool has_top = state.slot_of_expert[expert] != kNone && defence_.wants_slots();
    const std::size_t first = has_top ? state.top_records : 0;
    const bool is_known =
        (pool_ && pool_->find({expected_layer_index_, expert}) != nullptr) ||
        std::any_of(prefetched_.begin(), prefetched_.end(), [&](const auto& each) {
          return each.expert == expert && each.layer_index == expected_layer_index_;
        });
    if (first != state.num_records && !is_known) {
      auto transfer = submit(state, expert, first, std::nullopt, Urgency::prefetch);
      if (!transfer) return;
      if (pool_) {
        pool_->hold({expected_layer_index_, expert}, {std::move(transfer)});
      } else {
        prefetched_.push_back({expected_layer_index_, expert, first, std::move(transfer)});
      }
      ++state.counters.prefetch_issued;
      note(CacheEventKind::prefetch, state, expert);
    }
    expected_.pop_back();
  }
}

void ExpertCache::finish_item(LayerState& layer, const ExpertLease& lease,
                              ExpertLease::Item& item) {
  if (item.new_slot && item.copies_to_slot) {
    for (const RecordRun& run : item.transfer->read().runs) {
      if (run.first_record >= layer.top_records) break;
      const std::size_t count =
          std::min(run.num_records, layer.top_records - run.first_record) * layer.record_bytes;
      std::byte* target = slot(layer, *item.new_slot) + run.first_record * layer.record_bytes;
      backend_.copy(*compute_, target, run.data, count);
    }
  }
  item.is_finished = true;
  if (!item.transfer) return;
  const std::lock_guard lock(stats_mutex_);
  if (!item.was_held && (lease.mode_ == AccessMode::decode || item.was_prefetched)) {
    (item.was_prefetched ? layer.counters.prefetch_bytes : layer.counters.demand_bytes) +=
        engine_->bytes_read(*item.transfer);
  }
  if (pool_) finish_pooled(lease, item);
  item.transfer.reset();
}

}  // namespace moerun
