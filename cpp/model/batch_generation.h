// Text for many prompts: sequences join and leave, and a step gives each of those that run a token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "model/batch_outlook.h"
#include "model/batch_scheduler.h"
#include "model/batch_stats.h"
#include "model/batch_steps.h"
#include "model/generation.h"
#include "model/kv_arena.h"
#include "model/model.h"
#include "model/sampler.h"
#include "model/sequence_paths.h"

namespace moerun {

struct BatchOptions {
  // Sequences that run at once; 0: 16, or as many as go through the layers together.
  std::size_t batch_size = 0;
  // Memory of all KV caches, see parse_kv_budget: a share is one of batch_size sequences that fill
  // the context, more is never taken. Empty: all of that, as far as half of the free memory goes.
  std::string kv_budget;
  // Not off: twice batch_size sequences run, and a step decodes half of them (see BatchOutlook).
  ScheduleMode schedule = ScheduleMode::off;
  // The file of a predictor of experts, for scheduling, and for a cache with the policy predictive.
  std::filesystem::path predictor;
  ExpectedModel expected;  // what it must be of
};

// Of one sequence, a token of its text.
struct BatchToken {
  std::size_t sequence = 0;
  std::int32_t token_id = -1;
  // A stop token, the last that was asked for, or the last that the context holds.
  bool is_last = false;
};

// One thread steps; add(), cancel() and stats() may come from any, also in the middle of a step.
class BatchGeneration {
 public:
  // Throws InvalidArgument for a batch_size above Model::max_pass_tokens(), and for a model with a
  // replayed routing; OutOfMemory.
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
  // every sequence. InvalidArgument while another thread is in it.
  std::vector<BatchToken> step(const Checkpointer& between_layers = {});

  // Ends a sequence, if it has not ended; the step that runs gives it no token any more.
  void cancel(std::size_t sequence);

  BatchStats stats() const;
  bool is_lost() const noexcept { return model_->is_lost(); }  // see Model

 private:
  struct Entry {
    std::size_t number = 0;
    std::vector<std::int32_t> token_ids;  // prompt and answer so far
    GenerationParams params;
    std::size_t max_tokens = 0;  // of prompt and answer together
    // While it runs: of many that wait, they would be large.
    std::optional<Sampler> sampler;
    std::unique_ptr<KvSlab> kv;
    std::size_t num_stored = 0;  // tokens in it
    std::size_t num_generated = 0;
  };
  // The next tokens of an entry that are not stored yet.
  struct Piece {
    Entry* entry;
    std::size_t num_tokens;
  };

  std::vector<Entry> join();  // guarded
  BatchStats guarded_stats() const;
  void run_prompts(std::span<Entry> joined, const Checkpointer& between_layers,
                   std::vector<BatchToken>& tokens);
  void run_step(const Checkpointer& between_layers, std::vector<BatchToken>& tokens);
  std::vector<Entry*> next_batch();
  void compute_anew(std::span<Entry* const> batch, const Checkpointer& between_layers);
  void resume_trials() noexcept;
  std::size_t capacity() const;
  void run_pass(std::span<const Piece> pieces, bool is_decoding,
                const Checkpointer& between_layers);
  BatchToken sample(Entry& entry, std::span<float> logits);
  void count_step(const ActiveExpertCounts::Snapshot& active, const CacheTotals& cache);
  void end_step(std::vector<BatchToken>& tokens);
  void end(std::size_t sequence);
  void end_all() noexcept;

  std::shared_ptr<Model> model_;
  BatchOptions options_;
  std::unique_ptr<PassMemory> memory_;  // borrowed from the model
  std::optional<KvArena> arena_;
  std::vector<float> logits_;  // (capacity(), vocab_size)
  SteadyClock clock_;
  std::unique_ptr<BatchOutlook> outlook_;  // null: nothing is predicted
  mutable std::mutex mutex_;               // guards the rest, and the arena
  bool is_stepping_ = false;
  std::deque<Entry> waiting_;
  std::vector<Entry> running_;          // in a step changed by nobody, and read without the mutex
  std::vector<std::size_t> cancelled_;  // in a step
  std::size_t num_added_ = 0;
  BatchStats stats_;
};

// The pointer that owners of one hold.
using OwnedBatch = std::unique_ptr<BatchGeneration, DeleteUnlessLost>;

}  // namespace moerun
