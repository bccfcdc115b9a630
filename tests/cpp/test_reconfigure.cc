// Other slots and splits while the model stays loaded: nothing is lost that need not be, nothing is
// wrong, and the text does not change.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "model/generation.h"
#include "pattern_cache.h"

namespace moerun::test {
namespace {

using Strings = std::vector<std::string>;

std::vector<PlanLayer> random_layers(std::mt19937& random) {
  const double splits[] = {0, 0.4, 0.45, 0.9, 1, 1};
  std::vector<PlanLayer> layers;
  for (int i = 0; i < 2; ++i) layers.push_back({random() % 11, splits[random() % 6]});
  return layers;
}

std::set<std::size_t> as_set(const std::vector<std::size_t>& experts) {
  return {experts.begin(), experts.end()};
}

}  // namespace

TEST("reconfigure: slots hold the right bytes after any sequence of layouts, and failing reads") {
  std::mt19937 random(11);
  for (const std::string policy : {"lru", "lfu", "lcp"}) {
    PatternCache pattern(plan_text({{7, 1}, {6, 1}}, policy));
    ExpertCache& cache = pattern.cache();
    std::size_t num_changed = 0;
    std::size_t num_refused = 0;
    std::size_t num_failed = 0;
    for (int round = 0; round < 150; ++round) {
      for (int token = static_cast<int>(random() % 5); token > 0; --token) {
        pattern.decode(random_token(random));
      }
      if (random() % 4 == 0) pattern.use(1, {8, 3, 9, 1}, AccessMode::prefill);
      const std::vector<std::size_t> guess = {6, 7};
      if (random() % 4 == 0) cache.prefetch(2, guess);
      const CacheLayout next = pattern.layout(plan_text(random_layers(random), policy));
      const auto before = cache.residents();
      if (next.arena_bytes() > cache.arena_bytes()) {
        CHECK_THROWS(OutOfMemory, cache.reconfigure(next), "needs", "loaded with");
        CHECK(cache.residents() == before);
        ++num_refused;
        continue;
      }
      const CacheLayout old = cache.layout();
      pattern.store().reads_until_failure = random() % 2 == 0 ? static_cast<int>(random() % 3) : -1;
      bool is_whole = true;
      Reconfiguration changes;
      try {
        changes = cache.reconfigure(next);
        ++num_changed;
      } catch (const FileError&) {
        is_whole = false;
        ++num_failed;
      }
      pattern.store().reads_until_failure = -1;
      CHECK_EQ(cache.layout().slot_bytes(), next.slot_bytes());
      pattern.check_residents();
      if (!is_whole) continue;
      const auto after = cache.residents();
      for (std::size_t i = 0; i < 2; ++i) {
        const auto& layer = next.layers[i];
        const bool keeps = layer.num_slots != 0 && old.layers[i].num_slots != 0;
        const std::size_t kept = keeps ? std::min(before[i].size(), layer.num_slots) : 0;
        CHECK_EQ(changes.layers[i].kept, kept);
        CHECK_EQ(changes.layers[i].dropped, before[i].size() - kept);
        CHECK_EQ(after[i].size(), kept + changes.layers[i].warmed);
        const auto now = as_set(after[i]);
        for (std::size_t place = 0; place < kept; ++place) CHECK(now.contains(before[i][place]));
      }
    }
    if (std::min({num_changed, num_refused, num_failed}) < 5) {
      fail(__FILE__, __LINE__, num_changed, " changed, ", num_refused, " refused, ", num_failed);
    }
    CHECK_EQ(cache.stats().reconfigured, num_changed + num_failed);
  }
}

TEST("reconfigure: whole experts keep their tops without reading, and get the rest by reading it") {
  PatternCache pattern(plan_text({{4, 1}, {4, 1}}));
  ExpertCache& cache = pattern.cache();
  std::mt19937 random(3);
  for (int token = 0; token < 12; ++token) pattern.decode(random_token(random));
  const auto before = cache.residents();
  const auto smaller = cache.reconfigure(pattern.layout(plan_text({{4, 0.4}, {4, 0.4}})));
  CHECK_EQ(smaller.bytes_read, std::uint64_t{0});
  CHECK(cache.residents() == before);
  const std::size_t record_bytes = pattern.weights().layers[1].record_bytes();
  const auto larger = cache.reconfigure(pattern.layout(plan_text({{4, 1}, {4, 0.4}})));
  CHECK_EQ(larger.bytes_read, std::uint64_t{4 * (72 - 32)} * record_bytes);
  CHECK(cache.residents() == before);
  CHECK_EQ(cache.stats().warm_bytes, larger.bytes_read);
  pattern.check_residents();
}

TEST("reconfigure: a layer that had no slots gets the experts that it has used most") {
  PatternCache pattern(plan_text({{6, 1}, {0, 1}}, "lfu"));
  for (int token = 0; token < 5; ++token) pattern.decode({{0, 1, 2}, {7, 5, 3}});
  pattern.decode({{0, 1, 2}, {7, 5, 8}});
  CHECK(pattern.cache().residents()[1].empty());
  const auto changes =
      pattern.cache().reconfigure(pattern.layout(plan_text({{3, 1}, {3, 1}}, "lfu")));
  CHECK_EQ(changes.layers[1].warmed, std::size_t{3});
  CHECK(as_set(pattern.cache().residents()[1]) == as_set({7, 5, 3}));
  const auto misses = pattern.cache().stats().layers[1].misses;
  pattern.decode({{0, 1, 2}, {7, 5, 3}});
  CHECK_EQ(pattern.cache().stats().layers[1].misses, misses);
}

TEST("reconfigure: static lists and warm experts are those of the new plan") {
  const auto with = [](const std::string& first, const std::string& second) {
    return plan_text({{3, 1, first}, {3, 1, second}}, "static");
  };
  PatternCache pattern(with(R"(, "experts": [0, 1, 2])", R"(, "experts": [0, 1])"));
  ExpertCache& cache = pattern.cache();
  for (int token = 0; token < 2; ++token) pattern.decode({{0, 1, 2}, {0, 1, 2}});
  CHECK(as_set(cache.residents()[1]) == as_set({0, 1}));
  cache.reconfigure(pattern.layout(with(R"(, "experts": [0, 2, 5])", R"(, "experts": [1, 2])")));
  CHECK(as_set(cache.residents()[0]) == as_set({0, 2}));
  CHECK(as_set(cache.residents()[1]) == as_set({1, 2}));
  pattern.decode({{5, 1, 3}, {0, 3, 4}});
  CHECK(as_set(cache.residents()[0]) == as_set({0, 2, 5}));

  PatternCache lru(plan_text({{2, 1}, {4, 1}}, "lru"));
  lru.decode({{0, 1, 2}, {0, 1, 2}});
  lru.cache().reconfigure(lru.layout(plan_text({{2, 1}, {4, 1, R"(, "warm": [9, 2])"}}, "lru")));
  CHECK(as_set(lru.cache().residents()[1]) == as_set({0, 1, 2, 9}));
}

TEST("reconfigure: what cannot be is refused, and nothing changes") {
  PatternCache pattern(plan_text({{4, 1}, {4, 1}}));
  ExpertCache& cache = pattern.cache();
  pattern.decode({{0, 1, 2}, {3, 4, 5}});
  const auto before = cache.residents();
  const auto reconfigure = [&](const std::string& text) {
    cache.reconfigure(pattern.layout(text));
  };
  CHECK_THROWS(InvalidArgument, reconfigure(plan_text({{4, 1}, {4, 1}}, "lru")), "lcp", "lru");
  CHECK_THROWS(OutOfMemory, reconfigure(plan_text({{5, 1}, {4, 1}})), "larger budget");
  CHECK_THROWS(InvalidArgument,
               reconfigure(R"({"version": 1, "budget_bytes": 1000000000, "resident": true})"),
               "every expert");
  CacheLayout other = pattern.layout(plan_text({{1, 1}, {1, 1}}));
  other.layers[0].layer = 0;
  CHECK_THROWS(InvalidArgument, cache.reconfigure(other), "another model");
  {
    const std::vector<std::size_t> experts = {0, 1, 2};
    const auto lease = cache.acquire(1, experts, AccessMode::decode);
    CHECK_THROWS(InvalidArgument, reconfigure(plan_text({{1, 1}, {1, 1}})), "between tokens");
    CHECK_THROWS(InvalidArgument, cache.warm(1, experts), "between tokens");
  }
  CHECK(cache.residents() == before);
  CHECK_EQ(cache.stats().reconfigured, std::uint64_t{0});
}

TEST("warm: tops come into empty slots, the best first, and count apart") {
  PatternCache pattern(plan_text({{4, 0.4}, {0, 1}}, "lcp"));
  ExpertCache& cache = pattern.cache();
  const std::size_t top_bytes = 32 * pattern.weights().layers[1].record_bytes();
  const std::vector<std::size_t> first = {9, 3};
  CHECK_EQ(cache.warm(1, first), std::uint64_t{2 * top_bytes});
  const std::vector<std::size_t> more = {3, 3, 7, 9, 1, 2, 4};
  CHECK_EQ(cache.warm(1, more), std::uint64_t{2 * top_bytes});
  CHECK(as_set(cache.residents()[0]) == as_set({9, 3, 7, 1}));
  CHECK_EQ(cache.warm(2, more), std::uint64_t{0});
  pattern.check_residents();
  const CacheStats stats = cache.stats();
  CHECK_EQ(stats.warm_bytes, std::uint64_t{4 * top_bytes});
  CHECK_EQ(stats.layers[0].demand_bytes, std::uint64_t{0});
  CHECK_EQ(stats.link_bytes, std::uint64_t{0});
  const std::vector<std::size_t> wrong = {10};
  CHECK_THROWS(InvalidArgument, cache.warm(1, wrong), "0 to 9", "10");
  CHECK_THROWS(InvalidArgument, cache.warm(0, first), "no experts");
}

TEST("warm: an interruption keeps what was read, and nothing else") {
  PatternCache pattern(plan_text({{10, 1}, {0, 1}}));
  std::vector<std::size_t> all;
  for (std::size_t expert = 0; expert < 10; ++expert) all.push_back(expert);
  for (int stop_at = 1; stop_at < 10; stop_at += 2) {
    int calls = 0;
    const auto stop = [&] {
      if (++calls == stop_at) throw Interrupted("stop");
    };
    try {
      pattern.cache().warm(1, all, stop);
    } catch (const Interrupted&) {
    }
    pattern.check_residents();
  }
  pattern.cache().warm(1, all);
  CHECK_EQ(pattern.cache().residents()[0].size(), std::size_t{10});
  pattern.check_residents();
}

TEST("reconfigure: the bits are the same between any tokens, and with prefetch under way") {
  const auto tokens_of = [](const std::shared_ptr<Model>& model, const auto& between) {
    std::vector<std::uint64_t> found;
    Generation generation(model, {5, 17, 400, 33}, {{}, 30, {}});
    while (const auto token = generation.next()) {
      found.push_back(static_cast<std::uint64_t>(*token));
      found.push_back(generation.stats().logits_hash);
      between();
    }
    return found;
  };
  const auto reference = tokens_of(Model::load(MOERUN_TEST_MODEL, {}), [] {});
  std::mt19937 random(5);
  for (const std::string prefetch : {"on", "off", "auto"}) {
    ModelOptions options;
    options.experts.budget = "50%";
    options.experts.prefetch = prefetch;
    const auto model = Model::load(MOERUN_TEST_MODEL, options);
    std::size_t num_changed = 0;
    const auto change = [&] {
      std::string text =
          R"({"version": 1, "policy": "lcp", "budget_bytes": 1000000000, "layers": [)";
      for (std::size_t layer = 0; layer < 8; ++layer) {
        text += message(layer == 0 ? "" : ",", R"({"layer":)", layer, R"(,"slots":)", random() % 12,
                        R"(,"split":)", static_cast<double>(random() % 5) * 0.25, "}");
      }
      try {
        model->reconfigure("plan", text + "]}");
        ++num_changed;
      } catch (const OutOfMemory&) {
      }
    };
    CHECK(tokens_of(model, change) == reference);
    CHECK(num_changed > 8);
    CHECK_EQ(model->expert_cache()->stats().reconfigured, num_changed);
  }
  ModelOptions resident;
  resident.experts.budget = "100%";
  CHECK_THROWS(InvalidArgument,
               Model::load(MOERUN_TEST_MODEL, resident)->reconfigure("plan", plan_text({})),
               "no cache");
}

}  // namespace moerun::test
