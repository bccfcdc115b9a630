// The policy predictive, without a model: the pool alone, and the cache over experts whose bytes
// say where they belong.
#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "expert/expert_pool.h"
#include "pattern_cache.h"

namespace moerun::test {
namespace {

using Experts = std::vector<std::size_t>;

constexpr std::size_t kLayers = 2;
constexpr std::size_t kExperts = 10;

// Transfers are done when a test says so.
class ScriptedEngine final : public TransferEngine {
 public:
  void begin_pass(Stream&) override {}
  std::shared_ptr<Transfer> submit(SegmentRead read, StagingBlocks blocks,
                                   Urgency urgency) override {
    return std::make_shared<Transfer>(std::move(read), std::move(blocks), urgency);
  }
  bool is_complete(const Transfer& transfer) override {
    const auto found = is_done.find(&transfer);
    if (found == is_done.end()) throw FileError("injected: the disk has a bad day");
    return found->second;
  }
  bool is_usable(const Transfer& transfer) override { return is_complete(transfer); }
  std::uint64_t ready(const Transfer&) const override { return 0; }
  std::uint64_t bytes_read(const Transfer&) const override { return 0; }
  void promote(const std::shared_ptr<Transfer>&) override {}
  void cancel(const std::shared_ptr<Transfer>&) override {}
  void drain(const std::shared_ptr<Transfer>&) override {}
  TransferStats stats() const override { return {}; }

  std::shared_ptr<Transfer> begin() {
    auto transfer = submit({}, {}, Urgency::prefetch);
    is_done[transfer.get()] = false;
    return transfer;
  }
  std::map<const Transfer*, bool> is_done;  // others fail
};

bool is_at(const ExpertPool::Place& place, std::size_t layer, std::size_t expert) {
  return place.layer == layer && place.expert == expert;
}

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

std::vector<float> certainty(const Token& token) {
  std::vector<float> chances(kLayers * kExperts, 0.01F);
  for (std::size_t layer = 0; layer < kLayers; ++layer) {
    for (const std::size_t expert : token[layer]) chances[layer * kExperts + expert] = 0.95F;
  }
  return chances;
}

ExpertCacheOptions predictive(const std::string& budget, const std::string& prefetch = "auto") {
  ExpertCacheOptions options;
  options.policy = "predictive";
  options.budget = budget;
  options.prefetch = prefetch;
  return options;
}

// So that a few tokens decide; the first one is for nothing.
OnOffTrial::Params short_trial(std::size_t hold_tokens) {
  return {.warm_up_tokens = 1, .window_tokens = 2, .rounds = 1, .hold_tokens = hold_tokens};
}

// As many blocks as so many experts need.
std::string budget_of(std::size_t num_experts) {
  const CacheLayout layout = PatternCache(predictive("50%")).cache().layout();
  return std::to_string(num_experts * layout.block_bytes);
}

CacheCounters total_of(const ExpertCache& cache) {
  CacheCounters total;
  for (const auto& layer : cache.stats().layers) total += layer;
  return total;
}

std::size_t num_residents(const ExpertCache& cache) {
  std::size_t count = 0;
  for (const auto& experts : cache.residents()) count += experts.size();
  return count;
}

void decode(PatternCache& pattern, const Token& token, ForecastSource* forecasts = nullptr,
            double seconds = 0.001, const std::function<void(std::size_t)>& after_asking = {}) {
  pattern.begin_pass();
  pattern.cache().begin_step(1, forecasts);
  for (std::size_t i = 0; i < kLayers; ++i) {
    pattern.use(PatternCache::kLayers[i], token[i], AccessMode::decode,
                [&] { return after_asking ? after_asking(i) : void(); });
  }
  pattern.cache().finish_step(seconds);
}

// Steps until what was measured says that predicting does not pay.
void fall_back(PatternCache& pattern, const Token& token) {
  for (int step = 0; step < 5; ++step) {
    decode(pattern, token, nullptr, pattern.cache().wants_paths() ? 0.002 : 0.001);
  }
  CHECK(!pattern.cache().wants_paths() && !pattern.cache().stats().is_predicting);
}

Experts random_experts(std::mt19937& random, std::size_t count) {
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
void check_counters_with_nothing_held(const ExpertCache& cache) {
  for (const CacheCounters& layer : cache.stats().layers) {
    CHECK_EQ(layer.hits + layer.top_hits + layer.misses, layer.lookups);
    CHECK_EQ(layer.top_hits, std::uint64_t{0});
    CHECK_EQ(layer.prefetch_useful + layer.prefetch_late + layer.prefetch_wasted,
             layer.prefetch_issued);
    CHECK(layer.wasted_bytes <= layer.prefetch_bytes);
  }
}

}  // namespace

// The pool alone

TEST("expert pool: what is held is found, taken once, and counted") {
  ScriptedEngine engine;
  ExpertPool pool(2, 4);
  CHECK(pool.find({1, 2}) == nullptr && !pool.take({1, 2}).transfer);
  CHECK_EQ(pool.num_unused() + pool.num_on_the_way(), std::size_t{0});
  pool.hold({1, 2}, {engine.begin(), /*is_used=*/true, /*is_there=*/true});
  pool.hold({1, 0}, {engine.begin(), /*is_used=*/true, /*is_there=*/true});
  pool.hold({0, 3}, {engine.begin()});
  pool.hold({1, 1}, {engine.begin()});
  CHECK_EQ(pool.num_unused(), std::size_t{2});
  CHECK_EQ(pool.num_on_the_way(), std::size_t{2});
  CHECK(pool.used_experts(1) == Experts({0, 2}) && pool.used_experts(0).empty());
  const auto unused = pool.unused();
  CHECK(unused.size() == 2 && is_at(unused[0], 0, 3) && is_at(unused[1], 1, 1));

  const ExpertPool::Held taken = pool.take({1, 1});
  CHECK(taken.transfer && !taken.is_used && !taken.is_there);
  CHECK(pool.find({1, 1}) == nullptr && !pool.take({1, 1}).transfer);
  CHECK_EQ(pool.num_unused(), std::size_t{1});
  CHECK_EQ(pool.num_on_the_way(), std::size_t{1});
  CHECK(pool.take({1, 2}).is_used);
  CHECK_EQ(pool.num_unused(), std::size_t{1});
  CHECK(pool.used_experts(1) == Experts{0});
}

TEST("expert pool: looking finds what has come, and what has failed") {
  ScriptedEngine engine;
  ExpertPool pool(2, 4);
  const auto coming = engine.begin();
  const auto slow = engine.begin();
  const auto failing = engine.begin();
  pool.hold({0, 1}, {coming});
  pool.hold({0, 2}, {slow});
  pool.hold({1, 3}, {failing});
  CHECK(pool.look(engine).empty() && pool.num_on_the_way() == 3);
  engine.is_done[coming.get()] = true;
  engine.is_done.erase(failing.get());
  const auto failed = pool.look(engine);
  CHECK(failed.size() == 1 && is_at(failed[0], 1, 3));
  CHECK(pool.find({0, 1})->is_there && !pool.find({0, 1})->is_used);
  CHECK(!pool.find({0, 2})->is_there);
  // They stay until somebody lets them go, and are told of again.
  CHECK_EQ(pool.look(engine).size(), std::size_t{1});
  pool.take({1, 3});
  CHECK(pool.look(engine).empty());
  CHECK_EQ(pool.num_unused(), std::size_t{2});
  CHECK_EQ(pool.num_on_the_way(), std::size_t{1});
}

TEST("expert pool: the last needed is the one whose next use is last, of those that are there") {
  ScriptedEngine engine;
  ExpertPool pool(kLayers, kExperts);
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  CHECK(!pool.last_needed(next_use).has_value());
  next_use.expect({certainty({{1}, {2}}), {}});
  pool.hold({1, 7}, {engine.begin()});
  CHECK(is_at(*pool.last_needed(next_use), 1, 7));  // there is nothing else
  pool.hold({0, 1}, {engine.begin(), true, true});
  CHECK(is_at(*pool.last_needed(next_use), 0, 1));  // the only one that is there
  pool.hold({1, 2}, {engine.begin(), true, true});
  CHECK(is_at(*pool.last_needed(next_use), 1, 2));
  pool.hold({0, 5}, {engine.begin(), false, true});
  CHECK(is_at(*pool.last_needed(next_use), 0, 5));
  pool.take({0, 5});
  next_use.run(0, Experts{1});
  CHECK(is_at(*pool.last_needed(next_use), 0, 1));
}

// In the cache

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
      try {
        decode(pattern, token, source, predicts == (round % 2 == 0) ? 0.001 : 0.002, guess);
      } catch (const FileError&) {
        ++num_failed;
      }
      pattern.store().reads_until_failure = -1;
      pattern.begin_pass();
      if (random() % 5 == 0) {  // a prompt, of any number of experts
        const std::size_t layer = PatternCache::kLayers[random() % 2];
        pattern.use(layer, random_experts(random, 1 + random() % kExperts), AccessMode::prefill);
      }
      if (random() % 5 == 0) {  // a step that is cut off
        LateForecast lost(PathForecast{certainty(token), certainty(next)}, 1);
        cache.begin_step(1, &lost);
        const Experts experts = random_experts(random, 3);
        const auto mode = random() % 4 == 0 ? AccessMode::prefill : AccessMode::decode;
        const auto lease = cache.acquire(PatternCache::kLayers[random() % 2], experts, mode);
        std::vector<Segment> segments;
        if (random() % 2 == 0) lease->next(segments);
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

TEST("policy predictive: other slots to fall back to, from plans, while experts stay") {
  const std::size_t block_bytes = PatternCache(predictive("50%")).cache().layout().block_bytes;
  ExpertCacheOptions options = predictive(std::to_string(12 * block_bytes), "off");
  options.pool_trial = short_trial(1000);
  PatternCache pattern(options);
  ExpertCache& cache = pattern.cache();
  const auto next = [&](std::size_t first, std::size_t second, std::size_t blocks = 12) {
    return pattern.layout(plan_text({{first, 1}, {second, 1}}, "lcp", blocks * block_bytes),
                          "predictive");
  };
  const auto slots = [&] {
    const CacheLayout layout = cache.layout();
    return Experts{layout.layers[0].num_slots, layout.layers[1].num_slots};
  };
  CHECK(slots() == Experts({5, 4}));
  std::mt19937 random(9);
  for (int round = 0; round < 6; ++round) {
    for (int step = 0; step < 4; ++step) decode(pattern, random_token(random));
    const auto before = cache.residents();
    const std::size_t first = random() % 10;
    const auto changes = cache.reconfigure(next(first, 9 - first));
    CHECK_EQ(changes.bytes_read, std::uint64_t{0});
    CHECK(slots() == Experts({first, 9 - first}));
    CHECK(cache.residents() == before);
    CHECK(cache.wants_paths());  // what was measured is of other slots
    fall_back(pattern, random_token(random));
    for (int step = 0; step < 4; ++step) {
      decode(pattern, random_token(random), nullptr, 0.001);
      const auto residents = cache.residents();
      CHECK(residents[0].size() <= first && residents[1].size() <= 9 - first);
    }
    pattern.use(2, {9, 8, 7, 6, 5, 4, 3, 2, 1, 0}, AccessMode::prefill);
  }
  CHECK_EQ(cache.stats().reconfigured, std::uint64_t{6});
  CHECK_THROWS(OutOfMemory, cache.reconfigure(next(5, 5, 13)), "larger budget");
  const CacheLayout other = pattern.layout(plan_text({{1, 1}, {1, 1}}, "lcp", 12 * block_bytes));
  CHECK_THROWS(InvalidArgument, cache.reconfigure(other), "predictive", "lcp");
}

TEST("policy predictive: transfers are measured in an empty ring, after which all goes on") {
  PatternCache pattern(predictive(budget_of(7)));
  ExpertCache& cache = pattern.cache();
  const Token token = {{0, 1, 2}, {3, 4, 5}};
  decode(pattern, token);
  decode(pattern, token);
  CHECK_EQ(num_residents(cache), std::size_t{6});
  const Experts most = {0, 1, 2, 3, 4, 5, 6};
  const Experts too_many = {0, 1, 2, 3, 4, 5, 6, 7};
  CHECK_THROWS(InvalidArgument, cache.measure_transfers(1, too_many, 0), "only 7 of these 8");
  CHECK_EQ(num_residents(cache), std::size_t{6});
  const TransferTiming timing = cache.measure_transfers(1, most, 0);
  CHECK_EQ(timing.bytes, std::uint64_t{7 * 72 * pattern.weights().layers[1].record_bytes()});
  CHECK_EQ(num_residents(cache), std::size_t{0});
  decode(pattern, token);
  decode(pattern, token);
  CHECK_EQ(num_residents(cache), std::size_t{6});
}

TEST("policy predictive: the budget is one ring, slots are what it falls back to") {
  const PatternCache pattern(predictive("50%"));
  const auto layout_of = [&](const ExpertCacheOptions& options) {
    return make_cache_layout(pattern.weights(), PatternCache::kTopK, options, 0);
  };
  const std::size_t block_bytes = layout_of(predictive("50%")).block_bytes;
  for (std::size_t blocks = 3; blocks < 15; ++blocks) {
    for (const std::size_t more : {std::size_t{0}, block_bytes / 4}) {
      const std::string budget = std::to_string(blocks * block_bytes + more);
      const CacheLayout layout = layout_of(predictive(budget));
      CHECK_EQ(layout.num_blocks, blocks);
      CHECK(layout.is_pool && layout.slot_bytes() == 0);
      CHECK(layout.arena_bytes() <= layout.budget_bytes);
      const std::size_t first = layout.layers[0].num_slots;
      CHECK_EQ(first + layout.layers[1].num_slots, blocks - 3);
      CHECK_EQ(first, (blocks - 2) / 2);
    }
  }
  CHECK_THROWS(OutOfMemory, layout_of(predictive(std::to_string(3 * block_bytes - 1))),
               "smallest budget", std::to_string(3 * block_bytes));
  CHECK(!layout_of(predictive("100%")).is_pool);
  ExpertCacheOptions split = predictive("50%");
  split.split = {0.5};
  CHECK_THROWS(InvalidArgument, layout_of(split), "split", "predictive keeps whole experts");
  ExpertCacheOptions plan;
  plan.policy = "predictive";
  plan.plan = "plan";
  plan.plan_text = plan_text({{4, 1}, {2, 0.5}}, "lfu", 9 * block_bytes);
  const CacheLayout planned = layout_of(plan);
  CHECK(planned.policy == "predictive" && planned.num_blocks == 9);
  CHECK_EQ(planned.layers[0].num_slots, std::size_t{4});
  CHECK_EQ(planned.layers[1].num_slots, std::size_t{0});  // 2 x 32 of 72 records: no whole one
}

}  // namespace moerun::test
