// A model's expert cache on virtual time, fed by recorded routing: the same ExpertCache, policies,
// prefetch and trials as in a live run, but nothing is read and nothing computed.
// docs/simulation.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "expert/cache_layout.h"
#include "expert/cache_stats.h"
#include "expert/expert_store.h"
#include "expert/window_hits.h"
#include "replay/sim_engine.h"
#include "trace/cache_event.h"
#include "weights/model_weights.h"

namespace moerun {

// What the parts of a pass take, in seconds; the lists have one number for each layer with experts.
struct SimCosts {
  std::vector<double> attention_s;  // a token, from the end of the last expert block to the routing
  std::vector<double> moe_s;        // a token's expert block, every expert resident
  std::vector<double> prompt_s;     // both, for each token of a prompt
  double head_s = 0;                // from the end of the last expert block to the next token
  LinkCost link;
  double slowdown = 0;  // computing takes so much of its time longer while the link is busy
  double wake_s = 0;    // a layer takes so much longer if it waits, in which the link stands still
};

// The routing of one sequence, as RoutingRecord has it.
struct SimSequence {
  std::size_t num_tokens = 0;
  std::size_t prompt_tokens = 0;                // the first ones, computed as a prompt
  std::span<const std::uint16_t> expert_ids;    // (layers, tokens, top_k)
  std::span<const std::uint16_t> prefetch_ids;  // the same, or none recorded; see kNoExpert
};

struct SimOptions {
  ExpertCacheOptions cache;
  bool is_belady = false;           // in place of the layout's policy
  std::size_t prefill_chunk = 512;  // tokens of a prompt that go through the layers together
  TraceSink* sink = nullptr;        // told of the cache's events
  // Called between layers; may throw to end the simulation.
  std::function<void()> between_layers;
};

struct SimResult {
  CacheStats stats;
  WindowHits window;              // of the last tokens
  std::vector<double> ttft_s;     // of each sequence with a prompt
  std::vector<double> token_s;    // of each token decoded after a prompt or another token
  std::uint64_t moved_bytes = 0;  // over the link, prompts and what was in vain included
  double seconds = 0;             // from the first token to the last
  PrefetchMode prefetch = PrefetchMode::off;  // that was simulated
};

// One model runs the sequences one after the other, with a cache that stays warm. `layout`: of the
// model's weights, which need not be loaded; where it is resident there is no cache. Throws
// InvalidArgument for costs and routing that make no sense or do not fit the model, and for
// prefetch `on` without recorded predictions; without them, `auto` is off.
SimResult simulate(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
                   const PieceSizes& sizes, const SimCosts& costs,
                   std::span<const SimSequence> sequences, const SimOptions& options);

}  // namespace moerun
