// The policy predictive: layouts, plans, measuring, and batches that share a model.
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes_text.h"
#include "model/batch_generation.h"
#include "predictive_cache.h"
#include "random_predictor.h"

namespace moerun::test {

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
               "smallest budget", bytes_text(3 * block_bytes, Rounding::up));
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

// Two batches that predict, and a text, of one model: each from a thread of its own.
TEST("policy predictive: batches that predict share a model with each other and with a text") {
  const TempFolder folder;
  RandomPredictor file;
  file.metadata["moe_layers"] = "[1,2]";
  const auto predictor = folder.write("p.safetensors", file.bytes());
  const TempFolder model_folder;
  const auto path =
      write_small_model(model_folder, {.experts = 5, .top_k = 2, .intermediate = 64, .vocab = 11});
  const auto prompt_of = [](std::size_t number) {
    return std::vector<std::int32_t>(1 + number % 5, static_cast<std::int32_t>(number % 11));
  };
  const GenerationParams params{{}, 12, {}};
  const auto alone = [&](const std::shared_ptr<Model>& model, std::size_t number) {
    std::vector<std::int32_t> tokens;
    Generation generation(model, prompt_of(number), params);
    while (const auto token = generation.next()) tokens.push_back(*token);
    return tokens;
  };
  std::vector<std::vector<std::int32_t>> expected;
  const auto resident = Model::load(path, {});
  for (std::size_t number = 0; number < 8; ++number) expected.push_back(alone(resident, number));

  ModelOptions options;
  options.threads = 1;
  options.experts = predictive("60%");
  options.experts.pool_trial = short_trial(5);
  const auto model = Model::load(path, options);
  CHECK(model->cache_layout().is_pool);
  std::map<std::size_t, std::map<std::size_t, std::vector<std::int32_t>>> found;
  const auto run = [&](std::size_t which, ScheduleMode schedule) {
    BatchOptions batch_options;
    batch_options.batch_size = 3;
    batch_options.schedule = schedule;
    batch_options.predictor = predictor;
    BatchGeneration batch(model, batch_options);
    auto& texts = found[which];
    for (std::size_t number = 0; number < 8; ++number) batch.add(prompt_of(number), params);
    std::thread canceller([&] { batch.cancel(5); });
    for (auto step = batch.step(); !step.empty(); step = batch.step()) {
      for (const BatchToken& each : step) texts[each.sequence].push_back(each.token_id);
    }
    canceller.join();
    if (batch.stats().prediction.predictions == 0) throw Failure("nothing was predicted");
  };
  found[0];
  found[1];
  std::vector<std::string> failures(3);
  const auto guarded = [&](std::size_t which, const std::function<void()>& body) {
    return std::thread([&failures, which, body] {
      try {
        body();
      } catch (const std::exception& error) {
        failures[which] = error.what();
      }
    });
  };
  std::vector<std::thread> threads;
  threads.push_back(guarded(0, [&] { run(0, ScheduleMode::on); }));
  threads.push_back(guarded(1, [&] { run(1, ScheduleMode::off); }));
  threads.push_back(guarded(2, [&] {
    for (std::size_t number = 0; number < 4; ++number) {
      if (alone(model, number) != expected[number]) throw Failure("another text");
    }
  }));
  for (auto& thread : threads) thread.join();
  for (const std::string& failure : failures) CHECK_EQ(failure, std::string());
  for (auto& [which, texts] : found) {
    for (std::size_t number = 0; number < 8; ++number) {
      if (number != 5) CHECK(texts[number] == expected[number]);
    }
  }
}

}  // namespace moerun::test
