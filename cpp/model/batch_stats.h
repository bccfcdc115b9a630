// What a batch has come to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace moerun {

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
  std::uint64_t bytes = 0;  // read from the slow tier
  std::size_t kv_budget_bytes = 0;
  std::size_t kv_used_bytes = 0;
  std::size_t kv_peak_bytes = 0;
};

}  // namespace moerun
