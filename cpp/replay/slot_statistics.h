// What the planner wants to know of a layer's cache with every number of slots, from one replay of
// recorded routing: how many experts tokens miss, and which guesses of them are worth fetching.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/thread_pool.h"
#include "metrics/trace_view.h"

namespace moerun {

// Of one layer with E experts, of which tokens use k. Tables have a row of E + 1 numbers, for
// 0 ... E slots, for each x or r.
struct SlotStatistics {
  std::uint64_t num_tokens = 0;
  std::vector<std::uint64_t> missing;       // (k + 1, E + 1): tokens of which x experts had no slot
  std::vector<std::uint64_t> right;         // (k): tokens whose r-th guess was used
  std::vector<std::uint64_t> absent;        // (k, E + 1): whose r-th guess had no slot
  std::vector<std::uint64_t> absent_right;  // (k, E + 1): and was used
};

// By the rules of PolicyReplay. `guesses`: (sequences, layers, tokens, k) as the trace, experts
// named in advance, the likeliest first; kNoExpert for none; or nothing. `policy`: lru, lfu, lcp,
// "optimal" (see most_hits), or static, for which `ranking` (layers, E) has each layer's experts,
// the first to get a slot first. InvalidArgument for another policy, a wrong size or a wrong id.
// `restart`: see slot_hits.
std::vector<SlotStatistics> slot_statistics(const TraceView& trace,
                                            std::span<const std::uint16_t> guesses,
                                            std::string_view policy,
                                            std::span<const std::uint16_t> ranking, bool restart,
                                            ThreadPool& pool);

}  // namespace moerun
