// The policy predictive over experts whose bytes say where they belong.
#include <algorithm>
#include <chrono>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "predictive_cache.h"

namespace moerun::test {

TEST("policy predictive: bytes are right for any budget, forecast, prefetch and disk") {
  std::mt19937 random(21);
  const std::vector<std::string> budgets = {budget_of(3), budget_of(4), budget_of(7), budget_of(12),
                                            budget_of(14)};
  const std::vector<std::string> prefetches = {"on", "off", "auto"};
  std::size_t num_failed = 0;
  std::size_t num_cut = 0;
  CacheCounters sum;
  for (int round = 0; round < 60; ++round) {
    ExpertCacheOptions options = predictive(budgets[random() % 5], prefetches[random() % 3]);
    options.reader_threads = 1 + static_cast<int>(random() % 3);
    options.pool_trial = short_trial(3);
    options.prefetch_trial = short_trial(4);
    PatternCache pattern(options);
    ExpertCache& cache = pattern.cache();
    pattern.store().delay_us = round % 3 == 0 ? 200 : 0;
    const CacheLayout layout = cache.layout();
    CHECK(layout.is_pool && cache.arena_bytes() <= layout.budget_bytes);
    std::size_t num_predicting = 0;
    Token next = random_token(random);
    for (int step = 0; step < 30; ++step) {
      const Token token = std::exchange(next, random_token(random));
      // Right or wrong, in time or late or never; of the next step too, or not.
      std::optional<PathForecast> told;
      const auto what = random() % 4;
      if (what != 0) told.emplace();
      if (what != 0) told->now = certainty(what == 1 ? random_token(random) : token);
      if (what == 3) told->next = certainty(next);
      LateForecast forecasts(std::move(told), static_cast<int>(random() % 4));
      ForecastSource* source = random() % 4 == 0 ? nullptr : &forecasts;
      const bool predicts = cache.wants_paths();
      num_predicting += predicts ? 1 : 0;
      const auto guess = [&](std::size_t index) {
        if (!cache.wants_prefetch()) return;
        const bool is_right = random() % 2 == 0;
        const std::size_t to = (index + 1) % kLayers;
        const Token& of = to == 0 ? next : token;
        cache.prefetch(PatternCache::kLayers[to], is_right ? of[to] : random_experts(random, 3));
      };
      pattern.store().reads_until_failure = random() % 8 == 0 ? static_cast<int>(random() % 4) : -1;
      // Also after an injection has ended: what was read ahead may fail a little later.
      const auto tolerating = [&](const std::function<void()>& body) {
        try {
          body();
        } catch (const FileError&) {
          ++num_failed;
        }
      };
      const double seconds = predicts == (round % 2 == 0) ? 0.001 : 0.002;
      tolerating([&] { decode(pattern, token, source, seconds, guess); });
      pattern.store().reads_until_failure = -1;
      pattern.begin_pass();
      if (random() % 5 == 0) {  // a prompt, of any number of experts
        const std::size_t layer = PatternCache::kLayers[random() % 2];
        const Experts experts = random_experts(random, 1 + random() % kExperts);
        tolerating([&] { pattern.use(layer, experts, AccessMode::prefill); });
      }
      if (random() % 5 == 0) {  // a step that is cut off
        LateForecast lost(PathForecast{certainty(token), certainty(next)}, 1);
        cache.begin_step(1, &lost);
        const Experts experts = random_experts(random, 3);
        const auto mode = random() % 4 == 0 ? AccessMode::prefill : AccessMode::decode;
        const auto lease = cache.acquire(PatternCache::kLayers[random() % 2], experts, mode);
        std::vector<Segment> segments;
        if (random() % 2 == 0) tolerating([&] { lease->next(segments); });
        ++num_cut;
      }
      pattern.begin_pass();
      CHECK(num_residents(cache) <= layout.num_blocks);
    }
    CHECK(num_predicting > 0);
    const auto residents = cache.residents();
    for (std::size_t i = 0; i < kLayers; ++i) {
      for (const std::size_t expert : residents[i]) {
        pattern.use(PatternCache::kLayers[i], {expert}, AccessMode::prefill);
      }
    }
    cache.measure_transfers(1, Experts{0, 1, 2}, 0);
    CHECK_EQ(num_residents(cache), std::size_t{0});
    check_counters_with_nothing_held(cache);
    sum += total_of(cache);
  }
  // All of it has really happened.
  CHECK(num_failed > 20 && num_cut > 100);
  CHECK(sum.hits > 500 && sum.prefetch_useful > 50 && sum.prefetch_late > 20);
  CHECK(sum.prefetch_wasted > 20);
}

TEST("policy predictive: it falls back to the slots of lcp where that measures faster, and back") {
  ExpertCacheOptions options = predictive(budget_of(11), "off");
  options.pool_trial = short_trial(6);
  PatternCache pattern(options);
  ExpertCache& cache = pattern.cache();
  CHECK_EQ(cache.layout().layers[0].num_slots, std::size_t{4});
  std::mt19937 random(2);
  fall_back(pattern, random_token(random));
  CHECK(cache.stats().reason.find("prediction measured") != std::string::npos);
  CHECK(cache.stats().reason.find("switched off") != std::string::npos);
  bool was_back = false;
  for (int step = 0; step < 12; ++step) {
    const bool predicts = cache.wants_paths();
    was_back = was_back || (predicts && !cache.is_trying());
    decode(pattern, random_token(random), nullptr, predicts ? 0.001 : 0.002);
    if (predicts) continue;
    for (const auto& experts : cache.residents()) CHECK(experts.size() <= 4);
  }
  CHECK(was_back && cache.stats().is_predicting);
  CHECK(cache.stats().reason.find("stays on") != std::string::npos);
}

TEST("policy predictive: no trial while somebody else measures, or events are logged") {
  ExpertCacheOptions options = predictive(budget_of(11));
  options.pool_trial = short_trial(6);
  PatternCache pattern(options);
  ExpertCache& cache = pattern.cache();
  const Token token = {{0, 1, 2}, {3, 4, 5}};
  cache.pause_trials(true);
  for (int step = 0; step < 12; ++step) {
    CHECK(cache.wants_paths() && !cache.is_trying());
    decode(pattern, token);
  }
  cache.pause_trials(false);
  bool has_tried = false;
  for (int step = 0; step < 12; ++step) {
    has_tried = has_tried || cache.is_trying();
    decode(pattern, token);
  }
  CHECK(has_tried);
  SelfDefence logging(cache.layout(), options, /*is_logging=*/true);
  for (int step = 0; step < 12; ++step) {
    logging.record_pooled(0.001, /*knows_paths=*/true);
    CHECK(logging.wants_pool() && !logging.is_trying());
  }
}

// With nothing but its own slots for a layer to fill, there is always room for what is read once.
TEST("policy predictive: prompts leave no layer more than its slots, and room to go on") {
  const std::size_t block_bytes = PatternCache(predictive("50%")).cache().layout().block_bytes;
  ExpertCacheOptions options;
  options.policy = "predictive";
  options.prefetch = "off";
  options.plan = "plan";
  options.plan_text = plan_text({{3, 1}, {9, 1}}, "lcp", 15 * block_bytes);
  options.pool_trial = short_trial(1000);
  PatternCache pattern(options);
  ExpertCache& cache = pattern.cache();
  CHECK_EQ(cache.layout().layers[0].num_slots, std::size_t{3});
  CHECK_EQ(cache.layout().layers[1].num_slots, std::size_t{9});
  fall_back(pattern, {{0, 1, 2}, {0, 1, 2}});
  decode(pattern, {{0, 1, 2}, {0, 1, 2}}, nullptr, 0.001);
  // What is missing arrives before what was there is computed.
  const auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(30)); };
  pattern.begin_pass();
  pattern.use(1, {3, 4, 5, 6, 7, 8, 9, 0, 1, 2}, AccessMode::prefill, rest);
  CHECK_EQ(cache.residents()[0].size(), std::size_t{3});
  decode(pattern, {{0, 1, 2}, {3, 4, 5}});
  decode(pattern, {{0, 1, 2}, {6, 7, 8}});
  for (const std::size_t layer : {1, 2}) {
    pattern.use(layer, {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, AccessMode::prefill, rest);
  }
  CHECK_EQ(cache.residents()[0].size(), std::size_t{3});
  CHECK_EQ(cache.residents()[1].size(), std::size_t{9});
}

TEST("policy predictive: guesses about a layer end when it is there, also for a prompt") {
  ExpertCacheOptions options = predictive(budget_of(7), "on");
  options.pool_trial = short_trial(1000);
  PatternCache pattern(options);
  ExpertCache& cache = pattern.cache();
  const Token token = {{0, 1, 2}, {0, 1, 2}};
  fall_back(pattern, token);
  decode(pattern, token, nullptr, 0.001);
  cache.prefetch(1, Experts{4, 5, 6, 7, 8, 9});  // more than there is room for
  const std::uint64_t issued = cache.stats().layers[0].prefetch_issued;
  CHECK(issued >= 3 && issued < 6);
  pattern.use(1, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, AccessMode::prefill);
  CHECK_EQ(cache.stats().layers[0].prefetch_issued, issued);
  cache.measure_transfers(1, Experts{0}, 0);
  check_counters_with_nothing_held(cache);
}

TEST("policy predictive: layers share memory, and a cycle that lru always loses is known ahead") {
  std::vector<Token> cycle;
  for (std::size_t i = 0; i < 9; i += 3) cycle.push_back({{i, i + 1, i + 2}, {i, i + 1, i + 2}});
  std::map<std::string, std::uint64_t> hits;
  for (const std::string policy : {"lru", "predictive"}) {
    ExpertCacheOptions options = predictive(budget_of(11), "off");
    options.policy = policy;
    PatternCache pattern(options);
    for (std::size_t step = 0; step < 30; ++step) {
      LateForecast forecasts(
          PathForecast{certainty(cycle[step % 3]), certainty(cycle[(step + 1) % 3])}, 0);
      decode(pattern, cycle[step % 3], &forecasts);
    }
    hits[policy] = total_of(pattern.cache()).hits;
    CHECK_EQ(total_of(pattern.cache()).lookups, std::uint64_t{180});
  }
  CHECK_EQ(hits["lru"], std::uint64_t{0});
  CHECK(hits["predictive"] > 60);

  // One layer's experts are always the same, the other's never: lcp keeps as many of both.
  for (const std::string policy : {"lcp", "predictive"}) {
    ExpertCacheOptions options = predictive(budget_of(9), "off");
    options.policy = policy;
    PatternCache pattern(options);
    for (std::size_t step = 0; step < 30; ++step) {
      const std::size_t shift = 3 * (step % 3);
      decode(pattern, {{step % 2, 2 + step % 2, 4 + step % 2}, {shift, shift + 1, shift + 2}});
    }
    hits[policy] = pattern.cache().stats().layers[0].hits;
  }
  CHECK(hits["lcp"] < 45 && hits["predictive"] > hits["lcp"]);
}

TEST("policy predictive: experts of the first layer that are named at the end are read ahead") {
  PatternCache pattern(predictive(budget_of(14), "on"));
  ExpertCache& cache = pattern.cache();
  cache.begin_step(1);
  pattern.use(1, {0, 1, 2}, AccessMode::decode);
  pattern.use(2, {0, 1, 2}, AccessMode::decode);
  CHECK(cache.wants_prefetch());
  cache.prefetch(1, Experts{7, 8, 9});
  cache.finish_step(0.001);
  CHECK_EQ(cache.stats().layers[0].prefetch_issued, std::uint64_t{3});
  decode(pattern, {{7, 8, 9}, {0, 1, 2}});
  const CacheCounters first = cache.stats().layers[0];
  CHECK_EQ(first.prefetch_useful + first.prefetch_late, std::uint64_t{3});
  CHECK_EQ(cache.stats().layers[1].hits, std::uint64_t{3});
}

TEST("policy predictive: what comes late is not read ahead for the layer that is there") {
  PatternCache pattern(predictive(budget_of(14), "on"));
  ExpertCache& cache = pattern.cache();
  LateForecast forecasts(PathForecast{certainty({{7, 8, 9}, {4, 5, 6}}), {}}, 1);
  decode(pattern, {{0, 1, 2}, {4, 5, 6}}, &forecasts);
  CHECK_EQ(cache.stats().layers[0].prefetch_issued, std::uint64_t{0});
  const CacheCounters second = cache.stats().layers[1];
  CHECK_EQ(second.prefetch_issued, std::uint64_t{3});
  CHECK_EQ(second.prefetch_useful + second.prefetch_late, std::uint64_t{3});

  // Nobody is asked any more when the step is over, or was cut off.
  LateForecast lost(PathForecast{certainty({{7, 8, 9}, {7, 8, 9}}), {}}, 1);
  cache.begin_step(1, &lost);
  pattern.begin_pass();
  pattern.use(1, {0}, AccessMode::prefill);
  CHECK(lost.poll().has_value());
}

TEST("policy predictive: a forecast of another model is an error, and the cache goes on") {
  PatternCache pattern(predictive(budget_of(8)));
  const Token token = {{0, 1, 2}, {3, 4, 5}};
  for (const int polls : {0, 1, 2}) {
    LateForecast forecasts(PathForecast{{0.5F, 0.5F}, {}}, polls);
    CHECK_THROWS(InvalidArgument, decode(pattern, token, &forecasts), "2 x 10", "found 2");
  }
  decode(pattern, token);
}

}  // namespace moerun::test
