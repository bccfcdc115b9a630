// The fast tier: which experts are in it, and how the others get there in time.
//
// One arena holds, for every layer, slots with the top segments of some experts, and one staging
// ring for everything that is used once: bottom segments, experts without a slot, and what was
// prefetched. With the policy predictive all of it is the ring, and whole experts stay in its
// blocks. See docs/cache.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/expert_id.h"
#include "device/copy_queue.h"
#include "device/op_params.h"
#include "expert/cache_layout.h"
#include "expert/cache_stats.h"
#include "expert/expert_pool.h"
#include "expert/expert_store.h"
#include "expert/host_memory_tiers.h"
#include "expert/next_use.h"
#include "expert/policy.h"
#include "expert/progress.h"
#include "expert/reconfiguration.h"
#include "expert/routing_window.h"
#include "expert/self_defence.h"
#include "expert/staging_ring.h"
#include "expert/transfer_engine.h"
#include "expert/window_hits.h"
#include "trace/cache_event.h"

namespace moerun {

// Decoding is what the cache learns from. A prompt uses nearly all experts of a layer: it streams
// through the ring and takes no slot away, only empty ones.
enum class AccessMode { decode, prefill };

// What moving segments took, from asking for them until all of them were there.
struct TransferTiming {
  std::size_t num_pieces = 0;
  std::uint64_t bytes = 0;  // from the slow tier
  double seconds = 0;
};

class ExpertCache;

// The active experts of one layer, from the moment they are asked for until they are computed. At
// most one a cache at a time.
class ExpertLease {
 public:
  ExpertLease(const ExpertLease&) = delete;
  ExpertLease& operator=(const ExpertLease&) = delete;
  // Also ends a lease that was not served to its end; slots that were not filled become empty.
  ~ExpertLease();

  // Fills `segments` with what can be computed now and was not handed out before: first what is
  // resident, then the rest as it arrives. Segments of one expert come in rising order. Waits where
  // there is nothing yet; false when everything has been handed out. What the call before handed
  // out may be overwritten: it must have been computed. Throws what reading threw, and what
  // `while_waiting` (may be empty) throws, which is called now and then.
  bool next(std::vector<Segment>& segments, const std::function<void()>& while_waiting = {});

  // Seconds that next() waited so far.
  double waited_seconds() const { return waited_seconds_; }

 private:
  friend class ExpertCache;

  // What one expert still needs.
  struct Item {
    std::size_t expert = 0;
    std::optional<std::size_t> top_slot;  // holds the top segment from the start
    std::optional<std::size_t> new_slot;  // to be filled with it
    bool copies_to_slot = false;          // from the ring; otherwise it is read into the slot
    std::size_t first_record = 0;         // of what has to come; num_records: nothing
    std::shared_ptr<Transfer> transfer;   // null: not started for want of room in the ring
    bool was_prefetched = false;
    bool was_held = false;     // by the pool, and used before
    bool stays = false;        // in the pool
    bool is_top_out = false;   // handed out
    bool is_rest_out = false;  // handed out
    bool is_finished = false;  // computed, its blocks given back
  };

  ExpertLease(ExpertCache& cache, std::size_t layer_index, AccessMode mode);

  ExpertCache& cache_;
  std::size_t layer_index_;
  AccessMode mode_;
  std::vector<Item> items_;
  double waited_seconds_ = 0;
};

class ExpertCache {
 public:
  // `store` is the slow tier, or with `host` what of it is not page-locked; null where all is, or
  // where options.stand_ins has an engine. `host`: null where the device computes in host memory.
  // All must outlive the cache; `sink` may be null.
  ExpertCache(const ModelWeights& weights, CacheLayout layout, const ExpertStore* store,
              const HostMemoryTiers* host, const ExpertCacheOptions& options, TraceSink* sink,
              Backend& backend);
  ExpertCache(const ExpertCache&) = delete;
  ExpertCache& operator=(const ExpertCache&) = delete;

  CacheLayout layout() const;
  // Taken from the device, whatever the layout makes of it.
  std::size_t arena_bytes() const { return arena_bytes_; }

  // Which stream computes with the leases to come. It must outlive them.
  void begin_pass(Stream& compute);

  // `experts`: all different; when decoding in the router's order. Every expert is looked up before
  // any is loaded; then each in turn gets a slot where the policy gives it one. Slots of experts of
  // the same call are not taken away.
  std::unique_ptr<ExpertLease> acquire(std::size_t layer, std::span<const std::size_t> experts,
                                       AccessMode mode);

  // Whether predictions are welcome for the token being decoded.
  bool wants_prefetch() const;
  // Starts reading what is not resident of these experts of a layer, in this order, as far as the
  // ring has room, and goes on as the current lease gives room back. What the next lease of that
  // layer does not use is dropped then.
  void prefetch(std::size_t layer, std::span<const std::size_t> experts);

  // Whether it is worth predicting the experts of the step to come.
  bool wants_paths() const;

  // Around a step that decodes one token of each of so many sequences, which took so much time.
  // `forecasts`: of its experts, for the policy predictive; null where nobody tells. It is asked
  // until the step is finished.
  void begin_step(std::size_t num_tokens, ForecastSource* forecasts = nullptr);
  void finish_step(double seconds);
  // While somebody else compares steps with and without something, the cache should not.
  void pause_trials(bool is_paused);
  bool is_trying() const;

  CacheStats stats() const;
  std::uint64_t decode_tokens() const;

  // Moves the parts from `first_record` on of these experts of a layer into the ring, asked for all
  // at once as a layer's demand is, waits for them, and forgets them; what was prefetched is
  // dropped first, and with the policy predictive all experts are: they are in the ring. While no
  // lease is held, after begin_pass(). Counts nowhere. Throws what reading
  // threw, InvalidArgument for more experts than the ring holds or a record that is not there, and
  // what `while_waiting` (may be empty) throws.
  TransferTiming measure_transfers(std::size_t layer, std::span<const std::size_t> experts,
                                   std::size_t first_record,
                                   const std::function<void()>& while_waiting = {});

  // Experts in slots, of each layer of the layout; those that the policy values most first.
  std::vector<std::vector<std::size_t>> residents() const;

  // Reads the tops of these experts of a layer into slots that are empty, in this order; those that
  // are resident, or that the policy gives no slot, are passed over. Between passes, after
  // begin_pass(). Returns the bytes read. Throws what reading and `while_waiting` (may be empty)
  // throw; what was read by then stays.
  std::uint64_t warm(std::size_t layer, std::span<const std::size_t> experts,
                     const std::function<void()>& while_waiting = {});

  // Other slots and splits in the same arena, between passes, after begin_pass(). What the policies
  // have learned stays, and of every layer the residents that its policy values most; empty slots
  // are filled with the layout's warm experts, then with what the policy values. Throws
  // InvalidArgument for another policy or another model's layout, OutOfMemory where the arena is
  // too small, both before anything changes; and what warm() throws: then the new layout holds, and
  // what was not read is not resident.
  Reconfiguration reconfigure(const CacheLayout& next,
                              const std::function<void()>& while_waiting = {});

  // What the last tokens asked for, and what came of it. Any thread may ask.
  RoutingHistory routing_history() const;
  WindowHits window_hits() const;

 private:
  friend class ExpertLease;
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);

  struct LayerState {
    std::size_t layer = 0;
    std::size_t num_records = 0;  // of an expert
    std::size_t record_bytes = 0;
    std::size_t block_records = 0;  // in a block of the ring
    std::size_t top_records = 0;
    std::size_t slot_bytes = 0;
    std::byte* slots = nullptr;
    std::vector<std::size_t> expert_of_slot;
    std::vector<std::size_t> slot_of_expert;
    std::unique_ptr<CachePolicy> policy;  // null: nothing is ever cached
    CacheCounters counters;
  };
  struct Prefetched {
    std::size_t layer_index;
    std::size_t expert;
    std::size_t first_record;
    std::shared_ptr<Transfer> transfer;
  };

  // Records of an expert that a slot lacks.
  struct SlotFill {
    std::size_t layer_index;
    std::size_t expert;
    std::size_t slot;
    std::size_t first_record;  // 0: all of the top, for a slot that is empty
  };
  // An expert that keeps a slot in another layout.
  struct Kept {
    std::size_t layer_index;
    std::size_t expert;
    std::size_t slot;  // the new one
    std::size_t records;
    std::size_t bytes;
    std::byte* data;  // where they are
  };

  std::size_t index_of(std::size_t layer) const;
  std::byte* slot(const LayerState& layer, std::size_t index) const {
    return layer.slots + index * layer.slot_bytes;
  }
  void look_up(LayerState& layer, ExpertLease& lease, std::span<const std::size_t> experts,
               bool uses_slots);
  void count_look_up(LayerState& layer, const ExpertLease& lease, std::size_t expert,
                     CacheEventKind kind);
  // Of the policy predictive; cache_pooling.cc. Guarded all of them.
  bool is_predicting() const;
  void begin_pool_step(ForecastSource* forecasts);
  bool listen();
  void follow_defence();
  void empty_pool();
  void look_up_in_pool(LayerState& layer, ExpertLease& lease, std::span<const std::size_t> experts);
  void admit_to_pool(LayerState& layer, ExpertLease& lease);
  void drop_unused(std::optional<std::size_t> layer_index);
  void let_go(ExpertPool::Place place);
  bool make_room_for_demand(const ExpertLease& lease, std::size_t expert);
  bool make_room_ahead(ExpertPool::Place place);
  bool make_room(std::optional<double> moment);
  void choose_depth(double busy_share, double stalled_share);
  void finish_pooled(const ExpertLease& lease, ExpertLease::Item& item);
  void trim_pool();
  void list_expected();
  void look_at_pool();
  void prefetch_into_pool();
  void adopt_prefetched(std::size_t layer_index, ExpertLease& lease);
  void admit(LayerState& layer, ExpertLease& lease, bool uses_slots);
  void admit_to_empty_slots(LayerState& layer, ExpertLease& lease);
  void take_slot(LayerState& layer, ExpertLease::Item& item, std::size_t slot);
  void drop_prefetched(const Prefetched& dropped);
  void drop_all_prefetched();
  bool start(const LayerState& layer, const ExpertLease& lease,
             ExpertLease::Item& item);  // guarded
  std::shared_ptr<Transfer> submit(const LayerState& layer, std::size_t expert,
                                   std::size_t first_record, std::optional<std::size_t> slot,
                                   Urgency urgency);
  void continue_prefetch();
  void measure_link(const TransferStats& used);
  void finish_item(LayerState& layer, const ExpertLease& lease, ExpertLease::Item& item);
  void note(CacheEventKind kind, const LayerState& layer, std::size_t expert);
  std::vector<std::uint16_t> residents_of(std::size_t layer_index) const;
  // Slots for the first of `experts` that have none.
  void plan_fills(std::size_t layer_index, std::span<const std::size_t> experts,
                  std::vector<SlotFill>& fills) const;
  std::uint64_t fill(std::span<const SlotFill> fills, const std::function<void()>& while_waiting);
  void check_idle(const char* what) const;
  void wait_for_empty_ring(const std::function<void()>& while_waiting);
  void check_next(const CacheLayout& next) const;
  void settle_transfers();
  std::vector<Kept> choose_kept(const CacheLayout& next) const;
  void adopt(const CacheLayout& next);
  void move(std::vector<Kept>& kept);
  void move_left(std::byte* target, const std::byte* source, std::size_t bytes, std::byte* bounce);
  void move_right(std::byte* target, const std::byte* source, std::size_t bytes, std::byte* bounce);

  CacheLayout layout_;
  TraceSink* sink_;
  const ExpertStore* store_;
  Backend& backend_;
  SteadyClock steady_clock_;
  const Clock& clock_;
  Stream* compute_ = nullptr;
  Progress progress_;
  std::unique_ptr<DeviceBuffer> arena_;
  std::size_t arena_bytes_;
  std::optional<StagingRing> ring_;
  std::vector<LayerState> layers_;
  std::vector<Prefetched> prefetched_;
  // What is still to be prefetched when the ring has room, the likeliest last.
  std::size_t expected_layer_index_ = 0;
  std::vector<std::size_t> expected_;
  // With the policy predictive.
  std::optional<ExpertPool> pool_;
  std::optional<NextUse> next_use_;
  std::vector<ExpertPool::Place> candidates_;  // what to prefetch, the next one last
  ForecastSource* forecasts_ = nullptr;
  std::size_t depth_ = 0;                   // see choose_depth()
  double stalled_seconds_ = 0;              // in the step
  std::size_t leased_layer_index_ = kNone;  // of which all is known
  bool was_predicting_ = true;              // in the step before
  bool knows_paths_ = false;                // of the step
  bool has_waiting_demand_ = false;         // the lease wants more of the ring than there is
  mutable std::mutex stats_mutex_;          // counters are read by other threads
  std::uint64_t decode_tokens_ = 0;
  std::uint64_t decode_steps_ = 0;
  std::size_t step_tokens_ = 0;
  double decode_seconds_ = 0;
  TransferStats link_before_;      // when the step began
  bool is_between_steps_ = false;  // and nothing else was read since the last one
  TransferStats decode_link_;
  TransferStats stretch_;  // of decoding, since the rate was last taken
  double best_link_rate_ = 0;
  int num_leases_ = 0;
  std::uint64_t warm_bytes_ = 0;
  std::uint64_t num_reconfigured_ = 0;
  RoutingWindow window_;
  mutable std::mutex window_hits_mutex_;
  mutable std::optional<std::pair<std::uint64_t, WindowHits>> window_hits_;  // of a version
  SelfDefence defence_;
  std::unique_ptr<CopyQueue> copies_;       // null where the device computes in host memory
  std::unique_ptr<TransferEngine> engine_;  // last: it writes into all of the above
};

}  // namespace moerun
