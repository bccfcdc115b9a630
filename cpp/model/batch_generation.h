// Text for many prompts: sequences join and leave, and a step gives each of those that run a token.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/batch_stats.h"
#include "model/generation.h"
#include "model/kv_arena.h"
#include "model/model.h"
#include "model/sampler.h"

namespace moerun {

struct BatchOptions {
  std::size_t batch_size = 16;  // sequences that run at once
  // Memory of all KV caches, see parse_kv_budget: a share is one of batch_size sequences that fill
  // the context, more is never taken. Empty: all of that, as far as half of the free memory goes.
  std::string kv_budget;
};

// Of one sequence, a token of its text.
struct BatchToken {
  std::size_t sequence = 0;
  std::int32_t token_id = -1;
  // A stop token, the last that was asked for, or the last that the context holds.
  bool is_last = false;
};

class BatchGeneration {
 public:
  // Throws InvalidArgument for a batch_size of 0 or above the model's prefill_chunk, and for a
  // model with a replayed routing; OutOfMemory.
  BatchGeneration(std::shared_ptr<Model> model, const BatchOptions& options);
  ~BatchGeneration();
  BatchGeneration(const BatchGeneration&) = delete;
  BatchGeneration& operator=(const BatchGeneration&) = delete;

  // Puts a sequence at the end of those that wait, and returns its number, counted from 0. Throws
  // InvalidArgument for a prompt or parameters that Generation refuses, for a prompt that leaves no
  // room in the context, and for one that with its answer is larger than the KV budget.
  std::size_t add(std::vector<std::int32_t> prompt, const GenerationParams& params);

  // Runs the prompts of those sequences for which there is room, which gives each its first token;
  // or else decodes a token of each that runs. Nothing: all have ended. A call that throws ends
  // every sequence.
  std::vector<BatchToken> step(const Checkpointer& between_layers = {});

  // Ends a sequence, if it has not ended.
  void cancel(std::size_t sequence);

  BatchStats stats() const;
  Model& model() { return *model_; }

 private:
  using Clock = std::chrono::steady_clock;

  struct Entry {
    std::size_t number = 0;
    std::vector<std::int32_t> prompt;
    GenerationParams params;
    std::size_t max_tokens = 0;  // of prompt and answer together
    // While it runs: of many that wait, they would be large.
    std::optional<Sampler> sampler;
    std::unique_ptr<KvSlab> kv;
    std::size_t num_stored = 0;  // tokens in it
    std::size_t num_generated = 0;
    std::int32_t last_token = -1;
  };
  struct CacheTotals {
    std::uint64_t lookups = 0;
    std::uint64_t hits = 0;
    std::uint64_t bytes = 0;
  };
  // The next tokens of an entry's prompt.
  struct Piece {
    Entry* entry;
    std::size_t num_tokens;
  };

  std::vector<Entry> join();
  void run_prompts(std::span<Entry> joined, const Checkpointer& between_layers,
                   std::vector<BatchToken>& tokens);
  void run_step(const Checkpointer& between_layers, std::vector<BatchToken>& tokens);
  void run_pass(std::span<const Piece> pieces, bool is_decoding,
                const Checkpointer& between_layers);
  BatchToken sample(Entry& entry, std::span<float> logits);
  CacheTotals cache_totals() const;
  void end_all() noexcept;

  std::shared_ptr<Model> model_;
  BatchOptions options_;
  std::unique_ptr<PassMemory> memory_;  // borrowed from the model
  std::optional<KvArena> arena_;
  std::deque<Entry> waiting_;
  std::vector<Entry> running_;
  std::vector<float> logits_;  // (batch_size, vocab_size)
  std::size_t num_added_ = 0;
  ActiveExpertCounts::Snapshot active_before_;
  CacheTotals cache_before_;
  BatchStats stats_;
};

}  // namespace moerun
