// How a budget is divided: slots and split ratio of every layer, and the staging ring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "expert/expert_store.h"
#include "expert/on_off_trial.h"
#include "weights/model_weights.h"

namespace moerun {

class CachePolicy;
class Clock;
class Progress;
class TransferEngine;

enum class PrefetchMode { on, off, automatic };

std::string_view name_of(PrefetchMode mode);

// What a simulation puts in place of parts of the cache; empty: the real ones.
struct CacheStandIns {
  std::function<std::unique_ptr<TransferEngine>(Progress&)> make_engine;
  std::function<std::unique_ptr<CachePolicy>(std::size_t layer)> make_policy;
  const Clock* clock = nullptr;  // outlives the cache
};

// As users give them; empty means not given.
struct ExpertCacheOptions {
  std::string budget;         // see parse_budget; all that fits
  std::string policy;         // off, lru, lfu, lcp, static, predictive; lcp
  std::vector<double> split;  // one for all layers, or one per layer with experts
  std::string prefetch;       // on, off, auto; auto
  // Path of a JSON file instead of budget, policy and split; with the policy predictive it says the
  // slots of what that falls back to.
  std::string plan;
  std::string plan_text;  // in place of what is in that file; `plan` is then only its name
  // Folder of record files: experts are read from one, which is written first if it is not there.
  // Empty: straight from the checkpoint.
  std::string pack_folder;
  // For a device that copies experts from the host; see plan_host_memory.
  std::string pin_limit;            // as a budget, or 0: all that fits
  std::string host_tier;            // auto, memory, disk; auto
  std::size_t host_ring_bytes = 0;  // page-locked, for what is not; 0: enough. For tests.
  bool log_events = false;
  int reader_threads = 0;  // 0: enough for the slow tier
  OnOffTrial::Params prefetch_trial;
  OnOffTrial::Params cache_trial = {.warm_up_tokens = 256, .hold_tokens = 4096};
  OnOffTrial::Params pool_trial = {.window_tokens = 16};  // of the policy predictive
  std::size_t ring_experts = 0;  // size of the staging ring; 0: top_k. Smaller ones are for tests.
  // Puts a store of the caller's own before the checkpoint's.
  std::function<std::unique_ptr<ExpertStore>(std::unique_ptr<ExpertStore>)> wrap_store;
  CacheStandIns stand_ins;
};

struct LayerLayout {
  std::size_t layer = 0;
  std::size_t num_slots = 0;
  std::size_t top_records = 0;  // of an expert that has a slot: a multiple of the quantum, or all
  double split = 0;             // top_records as a share of the expert
  std::size_t slot_bytes = 0;   // of one slot
  std::vector<std::size_t> static_experts;
  std::vector<std::size_t> warm_experts = {};  // to be read into slots at once, the best first
};

struct CacheLayout {
  bool is_resident = false;  // every expert stays in memory and there is no cache
  std::string policy;        // "off": no slots
  PrefetchMode prefetch = PrefetchMode::automatic;
  std::size_t budget_bytes = 0;
  std::size_t smallest_budget_bytes = 0;
  std::size_t top_k = 0;  // experts that a token uses in a layer
  // Experts have no slots of their own: all is one ring, whose blocks hold one each (see
  // ExpertPool), and num_slots is what a layer keeps when its policy decides.
  bool is_pool = false;
  std::size_t block_bytes = 0;  // of the staging ring
  std::size_t num_blocks = 0;
  std::vector<LayerLayout> layers;  // those with experts, in order

  std::size_t ring_bytes() const { return num_blocks * block_bytes; }
  std::size_t slot_bytes() const;
  std::size_t arena_bytes() const { return ring_bytes() + slot_bytes(); }
};

// `available_bytes`: memory that is free for experts, used where no budget is given. Throws
// OutOfMemory naming the smallest budget that works, InvalidArgument for options that are out of
// range or contradict each other, FileError or FormatError for a plan.
CacheLayout make_cache_layout(const ModelWeights& weights, std::size_t top_k,
                              const ExpertCacheOptions& options, std::size_t available_bytes);

}  // namespace moerun
