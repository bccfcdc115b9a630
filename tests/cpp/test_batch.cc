// Many sequences at once: the tokens of each are those that it has alone.
#include <algorithm>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/batch_generation.h"
#include "model/kv_arena.h"

namespace moerun::test {
namespace {

const char* const kModel = MOERUN_TEST_MODEL;
using Tokens = std::vector<std::int32_t>;

BatchOptions batch_of(std::size_t size, const std::string& kv_budget = "") {
  BatchOptions options;
  options.batch_size = size;
  options.kv_budget = kv_budget;
  return options;
}

Tokens prompt_of(std::size_t count, std::size_t seed) {
  Tokens ids;
  for (std::size_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<std::int32_t>((i * 37 + seed * 911) % 4096));
  }
  return ids;
}

Tokens alone(const std::shared_ptr<Model>& model, const Tokens& prompt,
             const GenerationParams& params) {
  Tokens tokens;
  Generation generation(model, prompt, params);
  while (const auto token = generation.next()) tokens.push_back(*token);
  return tokens;
}

std::map<std::size_t, Tokens> run_all(BatchGeneration& batch) {
  std::map<std::size_t, Tokens> tokens;
  for (auto step = batch.step(); !step.empty(); step = batch.step()) {
    for (const BatchToken& each : step) tokens[each.sequence].push_back(each.token_id);
  }
  return tokens;
}

GenerationParams params_of(std::size_t index) {
  GenerationParams params;
  params.max_new_tokens = 3 + index * 5 % 17;
  if (index % 3 == 1) params.sampling = {.temperature = 0.8, .top_k = 20, .seed = index};
  if (index % 3 == 2) params.sampling.repetition_penalty = 1.2;
  return params;
}

// Prompts of 1 to 60 tokens in a batch of 4: they join and leave all the time.
void check_same_as_alone(const std::shared_ptr<Model>& model, const BatchOptions& options,
                         std::size_t count) {
  BatchGeneration batch(model, options);
  std::vector<Tokens> prompts;
  for (std::size_t i = 0; i < count; ++i) {
    prompts.push_back(prompt_of(1 + i * 23 % 60, i));
    CHECK_EQ(batch.add(prompts.back(), params_of(i)), i);
  }
  const auto found = run_all(batch);
  for (std::size_t i = 0; i < count; ++i) {
    CHECK(found.at(i) == alone(model, prompts[i], params_of(i)));
  }
  const BatchStats stats = batch.stats();
  CHECK_EQ(stats.finished, count);
  CHECK_EQ(stats.waiting + stats.running, std::size_t{0});
  CHECK_EQ(stats.kv_used_bytes, std::size_t{0});
  CHECK(stats.most_running > 1 && stats.most_running <= options.batch_size);
  CHECK(stats.kv_peak_bytes <= stats.kv_budget_bytes);
  std::size_t generated = 0;
  for (const auto& [_, tokens] : found) generated += tokens.size();
  CHECK_EQ(stats.generated_tokens, generated);
  CHECK_EQ(stats.decode_tokens, generated - count);
}

}  // namespace

TEST("sequences in a batch have the tokens that they have alone") {
  check_same_as_alone(Model::load(kModel, {}), batch_of(4), 14);
}

TEST("a batch runs prompts that are longer than what goes through the layers at once") {
  ModelOptions options;
  options.prefill_chunk = 16;
  check_same_as_alone(Model::load(kModel, options), batch_of(5), 11);
}

TEST("a batch has the same tokens with an expert cache of any policy, split and prefetch") {
  for (const char* policy : {"lru", "lfu", "lcp", "off"}) {
    ModelOptions options;
    options.experts.budget = "30%";
    options.experts.policy = policy;
    const bool is_plain = std::string(policy) == "lru" || std::string(policy) == "off";
    if (!is_plain) options.experts.split = {0.5};
    options.experts.prefetch = is_plain ? "off" : "on";
    const auto model = Model::load(kModel, options);
    check_same_as_alone(model, batch_of(4), 6);
    CHECK(model->batch_stats()->lookups > 0);
  }
}

TEST("sequences without room for their keys wait for others to end") {
  const auto model = Model::load(kModel, {});
  const std::size_t slab = KvArena::slab_bytes(model->config(), 60 + 19);
  check_same_as_alone(model, batch_of(8, std::to_string(2 * slab)), 9);
}

TEST("the arena of keys gives the lowest room, and takes back what was given") {
  const auto model = Model::load(kModel, {});
  const auto backend = make_cpu_backend(1, "portable");
  const std::size_t slab = KvArena::slab_bytes(model->config(), 16);
  KvArena arena(model->config(), 4 * slab, *backend);
  auto a = arena.try_take(16);
  auto b = arena.try_take(1);  // rounded up
  auto c = arena.try_take(32);
  CHECK(a && b && c);
  CHECK_EQ(arena.used_bytes(), 4 * slab);
  CHECK(arena.try_take(1) == nullptr);
  float* const place = b->cache().layer(0).keys;
  b.reset();
  CHECK(arena.try_take(17) == nullptr);  // only one quantum in a row is free
  b = arena.try_take(16);
  CHECK(b->cache().layer(0).keys == place);
  a.reset();
  b.reset();
  CHECK(arena.try_take(32) != nullptr);
  c.reset();
  CHECK_EQ(arena.used_bytes(), std::size_t{0});
  CHECK_EQ(arena.peak_bytes(), 4 * slab);
}

TEST("a batch refuses what cannot run, and goes on with the rest") {
  ModelOptions options;
  options.context_length = 64;
  const auto model = Model::load(kModel, options);
  CHECK_THROWS(InvalidArgument, BatchGeneration(model, batch_of(65)), "batch_size", "1 to 64",
               "65");
  CHECK_THROWS(InvalidArgument, BatchGeneration(model, batch_of(4, "much")), "kv_budget", "much");
  const std::size_t slab = KvArena::slab_bytes(model->config(), 32);
  BatchGeneration batch(model, batch_of(4, std::to_string(slab)));
  GenerationParams params;
  params.max_new_tokens = 20;
  CHECK_THROWS(InvalidArgument, batch.add({}, params), "at least one");
  CHECK_THROWS(InvalidArgument, batch.add(prompt_of(65, 0), params), "65", "64");
  CHECK_THROWS(InvalidArgument, batch.add(prompt_of(20, 0), params), "KV budget");
  CHECK_THROWS(InvalidArgument, batch.add(prompt_of(5, 0), {}), "max_new_tokens");
  GenerationParams hot = params;
  hot.sampling.temperature = -1;
  CHECK_THROWS(InvalidArgument, batch.add(prompt_of(5, 0), hot), "temperature");
  CHECK_EQ(batch.add(prompt_of(5, 0), params), std::size_t{0});
  CHECK_EQ(run_all(batch).at(0).size(), std::size_t{20});
}

TEST("a sequence of a batch ends at a stop token, a full context, or when it is cancelled") {
  ModelOptions options;
  options.context_length = 16;
  const auto model = Model::load(kModel, options);
  GenerationParams params;
  params.max_new_tokens = 100;
  const Tokens prompt = prompt_of(10, 3);
  const Tokens full = alone(model, prompt, params);
  CHECK_EQ(full.size(), std::size_t{7});
  GenerationParams stopped = params;
  stopped.stop_token_ids = {full[0]};
  BatchGeneration batch(model, batch_of(4));
  batch.add(prompt, params);
  batch.add(prompt, stopped);
  batch.add(prompt, params);
  CHECK_EQ(batch.step().size(), std::size_t{3});
  batch.cancel(2);
  batch.cancel(2);
  const auto rest = run_all(batch);
  CHECK_EQ(rest.size(), std::size_t{1});
  CHECK_EQ(rest.at(0).size(), std::size_t{6});
  CHECK_EQ(batch.stats().finished, std::size_t{3});
}

TEST("a batch may be added to and cancelled from other threads while it steps") {
  const auto model = Model::load(kModel, {});
  GenerationParams params;
  params.max_new_tokens = 30;
  BatchGeneration batch(model, batch_of(4));
  for (std::size_t i = 0; i < 4; ++i) batch.add(prompt_of(4, i), params);
  std::thread other([&] {
    for (std::size_t i = 4; i < 12; ++i) {
      CHECK_EQ(batch.add(prompt_of(4, i), params), i);
      if (i % 2 == 1) batch.cancel(i - 4);
      CHECK(batch.stats().running <= 4);
    }
  });
  auto found = run_all(batch);
  other.join();
  for (const auto& [sequence, tokens] : run_all(batch)) {
    found[sequence].insert(found[sequence].end(), tokens.begin(), tokens.end());
  }
  for (std::size_t i = 0; i < 12; ++i) {
    const Tokens whole = alone(model, prompt_of(4, i), params);
    const Tokens& part = found[i];
    const bool may_be_short = i % 2 == 1 && i < 8;
    CHECK(may_be_short ? part.size() <= whole.size() : part.size() == whole.size());
    CHECK(std::equal(part.begin(), part.end(), whole.begin()));
  }
  CHECK_EQ(batch.stats().finished, std::size_t{12});
}

TEST("only one thread at a time may step a batch") {
  const auto model = Model::load(kModel, {});
  BatchGeneration batch(model, batch_of(0));
  GenerationParams params;
  params.max_new_tokens = 3;
  batch.add(prompt_of(4, 0), params);
  bool was_refused = false;
  batch.step([&] {
    try {
      batch.step();
    } catch (const InvalidArgument&) {
      was_refused = true;
    }
  });
  CHECK(was_refused);
  CHECK_EQ(run_all(batch).at(0).size(), std::size_t{2});
}

TEST("an interruption of a batch ends its sequences and leaves the model usable") {
  const auto model = Model::load(kModel, {});
  GenerationParams params;
  params.max_new_tokens = 10;
  BatchGeneration batch(model, batch_of(4));
  for (std::size_t i = 0; i < 6; ++i) batch.add(prompt_of(4, i), params);
  CHECK_EQ(batch.step().size(), std::size_t{4});
  CHECK_THROWS(Interrupted, batch.step([] { throw Interrupted("stop"); }), "stop");
  CHECK(batch.step().empty());
  CHECK_EQ(batch.stats().kv_used_bytes, std::size_t{0});
  CHECK_EQ(batch.add(prompt_of(4, 1), params), std::size_t{6});
  CHECK(run_all(batch).at(6) == alone(model, prompt_of(4, 1), params));
}

TEST("the active experts of a step are counted") {
  const auto model = Model::load(kModel, {});
  GenerationParams params;
  params.max_new_tokens = 5;
  const auto layers = static_cast<std::size_t>(model->config().num_moe_layers());
  const auto top_k = static_cast<std::uint64_t>(model->config().top_k);
  BatchGeneration same(model, batch_of(4));
  for (int i = 0; i < 4; ++i) same.add(prompt_of(9, 0), params);
  run_all(same);
  const BatchStats alike = same.stats();
  CHECK_EQ(alike.steps, std::uint64_t{4});
  CHECK(alike.active_experts == std::vector<std::uint64_t>(layers, 4 * top_k));
  BatchGeneration mixed(model, batch_of(4));
  for (std::size_t i = 0; i < 4; ++i) mixed.add(prompt_of(9, i), params);
  run_all(mixed);
  for (const std::uint64_t count : mixed.stats().active_experts) {
    CHECK(count > 4 * top_k && count <= 16 * top_k);
  }
}

}  // namespace moerun::test
