// A model's expert cache on virtual time, fed by recorded routing: the same ExpertCache, policies,
// prefetch and trials as in a live run, but nothing is read and nothing computed.
// docs/simulation.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "expert/cache_layout.h"
#include "expert/cache_stats.h"
#include "expert/expert_store.h"
#include "expert/window_hits.h"
#include "model/batch_scheduler.h"
#include "model/batch_stats.h"
#include "predict/predictor_file.h"
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
  double slowdown = 0;   // computing takes so much of its time longer while the link is busy
  double wake_s = 0;     // a layer takes so much longer if it waits, in which the link stands still
  double predict_s = 0;  // predicting one sequence's experts, see SimOptions::predictor
};

// The routing of one sequence, as RoutingRecord has it.
struct SimSequence {
  std::size_t num_tokens = 0;
  std::size_t prompt_tokens = 0;                 // the first ones, computed as a prompt
  std::span<const std::uint16_t> expert_ids;     // (layers, tokens, top_k)
  std::span<const std::uint16_t> prefetch_ids;   // the same, or none recorded; see kNoExpert
  std::span<const std::int32_t> token_ids = {};  // (tokens), or none known
};

struct SimOptions {
  ExpertCacheOptions cache;
  bool is_belady = false;           // in place of the layout's policy
  std::size_t prefill_chunk = 512;  // tokens of a prompt that go through the layers together
  // So many sequences decode together, see BatchGeneration; 0: one runs after the other.
  std::size_t batch_size = 0;
  // Of a batch, as BatchOptions has them; but there is no `automatic`.
  ScheduleMode schedule = ScheduleMode::off;
  std::filesystem::path predictor;
  ExpectedModel expected;
  TraceSink* sink = nullptr;  // told of the cache's events
  // Called between layers; may throw to end the simulation.
  std::function<void()> between_layers;
};

struct SimResult {
  CacheStats stats;
  WindowHits window;                // of the last tokens
  std::optional<BatchStats> batch;  // with a batch_size
  // Of each sequence with a prompt, since it was begun.
  std::vector<double> ttft_s;
  // Of each token decoded after a prompt or another token; of a batch, of its step.
  std::vector<double> token_s;
  std::uint64_t moved_bytes = 0;  // over the link, prompts and what was in vain included
  double seconds = 0;             // from the first token to the last
  PrefetchMode prefetch = PrefetchMode::off;  // that was simulated
};

// One model runs the sequences, with a cache that stays warm. `layout`: of the model's weights,
// which need not be loaded; where it is resident there is no cache. Throws InvalidArgument for
// costs, routing and options that make no sense or do not fit the model or each other, and for
// prefetch `on` where nobody says what to read ahead; then `auto` is off. Throws what SequencePaths
// throws.
SimResult simulate(const ModelWeights& weights, CacheLayout layout, std::size_t top_k,
                   const PieceSizes& sizes, const SimCosts& costs,
                   std::span<const SimSequence> sequences, const SimOptions& options);

}  // namespace moerun
