#include "model/batch_steps.h"

#include <algorithm>

namespace moerun {

std::size_t batch_capacity(std::size_t batch_size, ScheduleMode schedule) {
  return batch_size * (schedule != ScheduleMode::off ? 2 : 1);
}

std::vector<std::vector<PromptPiece>> prompt_passes(std::span<const std::size_t> lengths,
                                                    std::size_t max_tokens) {
  std::vector<std::vector<PromptPiece>> passes;
  std::size_t room = 0;
  for (std::size_t prompt = 0; prompt < lengths.size(); ++prompt) {
    for (std::size_t left = lengths[prompt]; left != 0;) {
      if (room == 0) {
        passes.emplace_back();
        room = max_tokens;
      }
      const std::size_t count = std::min(room, left);
      left -= count;
      room -= count;
      passes.back().push_back({prompt, count, left == 0});
    }
  }
  return passes;
}

std::vector<std::size_t> choose_batch(BatchOutlook* outlook, ExpertCache* cache,
                                      std::span<const std::size_t> running,
                                      std::size_t batch_size) {
  if (outlook == nullptr) return {running.begin(), running.end()};
  if (cache != nullptr && cache->is_trying()) outlook->pass_over_round();
  std::vector<std::size_t> batch = outlook->next_batch(running, batch_size);
  if (cache != nullptr) cache->pause_trials(outlook->is_trying());
  return batch;
}

CacheTotals cache_totals(const ExpertCache* cache) {
  CacheTotals totals;
  if (cache == nullptr) return totals;
  for (const CacheCounters& layer : cache->stats().layers) {
    totals.lookups += layer.lookups;
    totals.hits += layer.hits + layer.top_hits;
    totals.ready += layer.hits + layer.top_hits + layer.prefetch_useful;
    totals.bytes += layer.demand_bytes + layer.prefetch_bytes;
  }
  return totals;
}

void count_cache(BatchStats& stats, const CacheTotals& before, const CacheTotals& after) {
  stats.lookups += after.lookups - before.lookups;
  stats.hits += after.hits - before.hits;
  stats.ready += after.ready - before.ready;
  stats.bytes += after.bytes - before.bytes;
}

}  // namespace moerun
