// Rules of a batch that a live one and a simulated one share: how many sequences run, how prompts
// are cut, who decodes next, and what the cache has counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "expert/expert_cache.h"
#include "model/batch_outlook.h"
#include "model/batch_scheduler.h"
#include "model/batch_stats.h"

namespace moerun {

// Sequences that run at once, of which a step decodes batch_size.
std::size_t batch_capacity(std::size_t batch_size, ScheduleMode schedule);

// The next tokens of a prompt that go through the layers together with those of others.
struct PromptPiece {
  std::size_t prompt = 0;
  std::size_t num_tokens = 0;
  bool is_last = false;
};
// The passes that take prompts of these lengths through the layers, one prompt after the other, at
// most `max_tokens` tokens in each. A prompt without tokens has no piece.
std::vector<std::vector<PromptPiece>> prompt_passes(std::span<const std::size_t> lengths,
                                                    std::size_t max_tokens);

// Those of `running` that decode in the next step; see BatchOutlook::next_batch. Null: no outlook,
// no cache. Either the cache or the outlook compares steps, never both at a time.
std::vector<std::size_t> choose_batch(BatchOutlook* outlook, ExpertCache* cache,
                                      std::span<const std::size_t> running, std::size_t batch_size);

// All that a cache has counted so far; zeros without one.
struct CacheTotals {
  std::uint64_t lookups = 0;
  std::uint64_t hits = 0;
  std::uint64_t ready = 0;
  std::uint64_t bytes = 0;
};
CacheTotals cache_totals(const ExpertCache* cache);
// What a step added to what stood before it.
void count_cache(BatchStats& stats, const CacheTotals& before, const CacheTotals& after);

}  // namespace moerun
