// What a batch has come to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moerun {

// Of rounds of two batches; see BatchScheduler.
struct ScheduleStats {
  bool is_there = false;
  bool is_active = false;  // the last trial's outcome, or switched on
  std::uint64_t rounds = 0;
  std::uint64_t scheduled_rounds = 0;
  double split_seconds = 0;
  // Experts of all layers and both batches, summed over scheduled rounds: as they were predicted
  // for the batches that were made, and for batches in order of arrival.
  std::uint64_t predicted_experts = 0;
  std::uint64_t predicted_in_order = 0;
  double token_seconds_on = 0;  // of the last trial; 0: none yet
  double token_seconds_off = 0;
};

// Of predicting experts.
struct PredictionStats {
  bool is_there = false;
  std::uint64_t predictions = 0;  // of several sequences each
  std::uint64_t sequences = 0;    // of all of them together
  double seconds = 0;             // that they took, partly beside steps
  double waited_seconds = 0;      // for those, when the step was over
};

struct BatchStats {
  // Sequences.
  std::size_t waiting = 0;
  std::size_t running = 0;
  std::size_t finished = 0;
  std::size_t most_running = 0;
  // Tokens. What was generated came from prompts, one each, or else from a step.
  std::uint64_t prompt_tokens = 0;
  std::uint64_t generated_tokens = 0;
  std::uint64_t decode_tokens = 0;
  std::uint64_t steps = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;
  // Routed experts of each layer that has some, summed over the steps; empty where the device keeps
  // the routing to itself.
  std::vector<std::uint64_t> active_experts;
  // Of the expert cache, in these steps.
  std::uint64_t lookups = 0;
  std::uint64_t hits = 0;   // whole experts and top segments
  std::uint64_t ready = 0;  // the same, and what was prefetched in time
  std::uint64_t bytes = 0;  // read from the slow tier
  std::size_t kv_budget_bytes = 0;
  std::size_t kv_used_bytes = 0;
  std::size_t kv_peak_bytes = 0;
  PredictionStats prediction;
  ScheduleStats schedule;
};

}  // namespace moerun
