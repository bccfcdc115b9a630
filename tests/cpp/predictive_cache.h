// What tests of the policy predictive share.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "pattern_cache.h"

namespace moerun::test {

using Experts = std::vector<std::size_t>;

inline constexpr std::size_t kLayers = 2;
inline constexpr std::size_t kExperts = 10;

// Tells a forecast when it has been asked so often.
class LateForecast final : public ForecastSource {
 public:
  LateForecast(std::optional<PathForecast> forecast, int polls)
      : forecast_(std::move(forecast)), polls_(polls) {}
  std::optional<PathForecast> poll() override {
    if (polls_-- > 0) return std::nullopt;
    return std::exchange(forecast_, std::nullopt);
  }

 private:
  std::optional<PathForecast> forecast_;
  int polls_;
};

using Token = std::vector<Experts>;  // of each layer

inline std::vector<float> certainty(const Token& token) {
  std::vector<float> chances(kLayers * kExperts, 0.01F);
  for (std::size_t layer = 0; layer < kLayers; ++layer) {
    for (const std::size_t expert : token[layer]) chances[layer * kExperts + expert] = 0.95F;
  }
  return chances;
}

inline ExpertCacheOptions predictive(const std::string& budget,
                                     const std::string& prefetch = "auto") {
  ExpertCacheOptions options;
  options.policy = "predictive";
  options.budget = budget;
  options.prefetch = prefetch;
  return options;
}

// So that a few tokens decide; the first one is for nothing.
inline OnOffTrial::Params short_trial(std::size_t hold_tokens) {
  return {.warm_up_tokens = 1, .window_tokens = 2, .rounds = 1, .hold_tokens = hold_tokens};
}

// As many blocks as so many experts need.
inline std::string budget_of(std::size_t num_experts) {
  const CacheLayout layout = PatternCache(predictive("50%")).cache().layout();
  return std::to_string(num_experts * layout.block_bytes);
}

inline CacheCounters total_of(const ExpertCache& cache) {
  CacheCounters total;
  for (const auto& layer : cache.stats().layers) total += layer;
  return total;
}

inline std::size_t num_residents(const ExpertCache& cache) {
  std::size_t count = 0;
  for (const auto& experts : cache.residents()) count += experts.size();
  return count;
}

inline void decode(PatternCache& pattern, const Token& token, ForecastSource* forecasts = nullptr,
                   double seconds = 0.001,
                   const std::function<void(std::size_t)>& after_asking = {}) {
  pattern.begin_pass();
  pattern.cache().begin_step(1, forecasts);
  for (std::size_t i = 0; i < kLayers; ++i) {
    pattern.use(PatternCache::kLayers[i], token[i], AccessMode::decode,
                [&] { return after_asking ? after_asking(i) : void(); });
  }
  pattern.cache().finish_step(seconds);
}

// Steps until what was measured says that predicting does not pay.
inline void fall_back(PatternCache& pattern, const Token& token) {
  for (int step = 0; step < 5; ++step) {
    decode(pattern, token, nullptr, pattern.cache().wants_paths() ? 0.002 : 0.001);
  }
  CHECK(!pattern.cache().wants_paths() && !pattern.cache().stats().is_predicting);
}

inline Experts random_experts(std::mt19937& random, std::size_t count) {
  Experts experts;
  while (experts.size() < count) {
    const std::size_t expert = random() % kExperts;
    if (std::find(experts.begin(), experts.end(), expert) == experts.end()) {
      experts.push_back(expert);
    }
  }
  return experts;
}

// Nothing that was read ahead is held any more.
inline void check_counters_with_nothing_held(const ExpertCache& cache) {
  for (const CacheCounters& layer : cache.stats().layers) {
    CHECK_EQ(layer.hits + layer.top_hits + layer.misses, layer.lookups);
    CHECK_EQ(layer.top_hits, std::uint64_t{0});
    CHECK_EQ(layer.prefetch_useful + layer.prefetch_late + layer.prefetch_wasted,
             layer.prefetch_issued);
    CHECK(layer.wasted_bytes <= layer.prefetch_bytes);
  }
}

}  // namespace moerun::test
