// A simulation does what the live run did, event by event.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/record_file.h"
#include "model/session.h"
#include "replay/simulator.h"
#include "small_model.h"
#include "trace/event_log.h"

namespace moerun::test {
namespace {

constexpr std::size_t kPrompt = 23;
constexpr std::size_t kNewTokens = 24;

// What a cache did, and the routing that it did it with.
struct Outcome {
  RoutingRecord routing;
  std::vector<CacheEvent> events;
  CacheStats stats;
};

Outcome run_live(const std::filesystem::path& path, const ModelOptions& options) {
  const auto model = Model::load(path, options);
  Outcome live;
  RoutingRecord& record = live.routing;
  record.num_layers = model->weights().num_moe_layers();
  record.num_tokens = kPrompt + kNewTokens;
  record.top_k = static_cast<std::size_t>(model->config().top_k);
  record.num_experts = static_cast<std::size_t>(model->config().num_experts);
  record.options.with_prefetch = true;
  record.allocate();
  const auto vocab = static_cast<std::size_t>(model->config().vocab_size);
  std::vector<float> logits(vocab);
  std::vector<std::int32_t> prompt;
  for (std::size_t i = 0; i < kPrompt; ++i) {
    prompt.push_back(static_cast<std::int32_t>(i * 37 % vocab));
  }
  Session session(model);
  session.append(prompt, logits, {}, &record);
  for (std::size_t i = 0; i < kNewTokens; ++i) {
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    // Not always the likeliest: a random model repeats itself.
    const auto token = static_cast<std::int32_t>((static_cast<std::size_t>(best) + i) % vocab);
    session.append({&token, 1}, logits, {}, &record);
  }
  live.events = model->cache_events();
  live.stats = model->expert_cache()->stats();
  return live;
}

Outcome run_simulated(const std::filesystem::path& path, const ModelOptions& options,
                      const Outcome& live) {
  const ModelPlan plan = plan_model(path, options);
  std::unique_ptr<PieceSizes> sizes = std::make_unique<CheckpointStore>(*plan.weights);
  if (!options.experts.pack_folder.empty()) {
    sizes = std::make_unique<RecordPieces>(*plan.weights, RecordFileLayout(*plan.weights, path),
                                           live.stats.is_direct);
  }
  const std::vector<double> seconds(plan.weights->num_moe_layers(), 1e-4);
  const SimSequence sequence{kPrompt + kNewTokens, kPrompt, live.routing.expert_ids,
                             live.routing.prefetch_ids};
  EventLog log;
  SimOptions sim;
  sim.cache = options.experts;
  sim.prefill_chunk = static_cast<std::size_t>(options.prefill_chunk);
  sim.sink = &log;
  Outcome simulated;
  simulated.stats = simulate(*plan.weights, plan.layout(), live.routing.top_k, *sizes,
                             {seconds, seconds, seconds, 1e-4, {1e-5, 1e9}}, {&sequence, 1}, sim)
                        .stats;
  simulated.events = log.take();
  return simulated;
}

bool is_of_prefetch(const CacheEvent& event) { return event.kind >= CacheEventKind::prefetch; }

// With prefetch on, when what arrives depends on the disk: then only what policies decide is equal.
void check_equal(const Outcome& live, const Outcome& simulated, bool with_prefetch,
                 const std::string& what) {
  auto expected = live.events;
  auto found = simulated.events;
  if (with_prefetch) {
    std::erase_if(expected, is_of_prefetch);
    std::erase_if(found, is_of_prefetch);
  }
  if (expected.size() < kNewTokens * live.routing.num_layers * live.routing.top_k) {
    fail(__FILE__, __LINE__, what, ": the live run has only ", expected.size(), " events");
  }
  for (std::size_t i = 0; i < std::max(expected.size(), found.size()); ++i) {
    if (i < expected.size() && i < found.size() && expected[i] == found[i]) continue;
    fail(__FILE__, __LINE__, what, ": event ", i, " of ", expected.size(), " differs, of ",
         found.size(), " simulated");
  }
  CHECK_EQ(live.stats.decode_tokens, simulated.stats.decode_tokens);
  for (std::size_t i = 0; i < live.stats.layers.size(); ++i) {
    const CacheCounters& a = live.stats.layers[i];
    const CacheCounters& b = simulated.stats.layers[i];
    CHECK_EQ(a.lookups, b.lookups);
    CHECK_EQ(a.hits, b.hits);
    CHECK_EQ(a.top_hits, b.top_hits);
    CHECK_EQ(a.misses, b.misses);
    if (with_prefetch) continue;
    if (a.demand_bytes != b.demand_bytes) {
      fail(__FILE__, __LINE__, what, ": ", a.demand_bytes, " bytes of demand, simulated ",
           b.demand_bytes);
    }
  }
}

void check_same(const std::filesystem::path& path, ModelOptions options, const std::string& what) {
  options.experts.log_events = true;
  options.prefill_chunk = 10;
  const Outcome live = run_live(path, options);
  check_equal(live, run_simulated(path, options, live), options.experts.prefetch == "on", what);
}

// A plan of the policy static that lists some experts of every layer.
std::filesystem::path write_static_plan(const TempFolder& folder, const std::filesystem::path& path,
                                        double split) {
  const ModelPlan plan = plan_model(path, {});
  std::string layers;
  for (std::size_t i = 0; i < plan.weights->layers.size(); ++i) {
    if (plan.weights->layers[i].experts.num_experts == 0) continue;
    layers += std::string(layers.empty() ? "" : ",") + "{\"layer\":" + std::to_string(i) +
              ",\"slots\":3,\"split\":" + std::to_string(split) + ",\"experts\":[0,2,5,7]}";
  }
  return folder.write("plan.json", "{\"version\":1,\"policy\":\"static\",\"budget_bytes\":" +
                                       std::to_string(plan.weights->expert_bytes()) +
                                       ",\"layers\":[" + layers + "]}");
}

std::string smallest_budget(const std::filesystem::path& path) {
  ModelOptions options;
  options.experts.budget = "50%";
  return std::to_string(plan_model(path, options).layout().smallest_budget_bytes);
}

}  // namespace

TEST("simulated events and bytes are the live run's, for every policy, split, budget and store") {
  TempFolder folder;
  TempFolder packs;
  const auto path = write_small_model(folder, {});
  for (const bool is_packed : {false, true}) {
    ModelOptions options;
    options.experts.prefetch = "off";
    if (is_packed) options.experts.pack_folder = packs.path().string();
    const std::string store = is_packed ? "packed " : "";
    for (const char* policy : {"lru", "lfu", "lcp"}) {
      for (const double split : {0.0, 0.4, 1.0}) {
        for (const std::string& budget : {smallest_budget(path), std::string("60%")}) {
          options.experts.policy = policy;
          options.experts.split = {split};
          options.experts.budget = budget;
          check_same(path, options, message(store, policy, " ", split, " ", budget));
        }
      }
    }
    options.experts.split = {};
    options.experts.policy = "off";
    check_same(path, options, store + "off");
    options.experts.policy = options.experts.budget = "";
    for (const double split : {0.4, 1.0}) {
      options.experts.plan = write_static_plan(packs, path, split).string();
      check_same(path, options, message(store, "static ", split));
    }
  }
}

TEST("simulated events and bytes are the live run's for the shipped model, and for a tiny ring") {
  TempFolder packs;
  const std::filesystem::path path = MOERUN_TEST_MODEL;
  ModelOptions options;
  options.experts.prefetch = "off";
  for (const char* policy : {"lru", "lfu", "lcp"}) {
    for (const double split : {0.4, 1.0}) {
      options.experts.policy = policy;
      options.experts.split = {split};
      options.experts.budget = split == 1 ? "25%" : "50%";
      options.experts.ring_experts = split == 1 ? 0 : 2;
      options.experts.pack_folder = policy[1] == 'r' ? packs.path().string() : "";
      check_same(path, options, message(policy, " ", split));
    }
  }
}

TEST("with prefetch, a simulation looks up, hits, inserts and evicts as the live run does") {
  TempFolder folder;
  const auto small = write_small_model(folder, {});
  for (const std::filesystem::path& path : {small, std::filesystem::path(MOERUN_TEST_MODEL)}) {
    for (const double split : {0.0, 0.4, 1.0}) {
      ModelOptions options;
      options.experts.prefetch = "on";
      options.experts.split = {split};
      options.experts.budget = "55%";
      check_same(path, options, message(path.string(), " ", split));
    }
  }
}

TEST("recorded predictions are what the live prefetcher is told") {
  TempFolder folder;
  const auto small = write_small_model(folder, {});
  for (const std::filesystem::path& path : {small, std::filesystem::path(MOERUN_TEST_MODEL)}) {
    ModelOptions options;
    options.prefill_chunk = 10;
    options.experts.log_events = true;
    options.experts.prefetch = "on";
    options.experts.split = {0.0};  // so that every guess is asked for
    options.experts.budget = "90%";
    const ModelPlan plan = plan_model(path, options);
    options.experts.ring_experts = 4 * static_cast<std::size_t>(plan.config.top_k);
    const Outcome live = run_live(path, options);
    const RoutingRecord& routing = live.routing;
    const auto prefetches = [](const Outcome& outcome) {
      std::vector<CacheEvent> events;
      for (const CacheEvent& event : outcome.events) {
        if (event.kind == CacheEventKind::prefetch) events.push_back(event);
      }
      return events;
    };
    auto expected = prefetches(live);
    CHECK_EQ(expected.size(), kNewTokens * routing.num_layers * routing.top_k);
    expected.resize(expected.size() - routing.top_k);  // for a token that did not come
    const auto found = prefetches(run_simulated(path, options, live));
    CHECK(found == expected);
    // Of a prompt they are the same, but that nothing is before its first token.
    for (std::size_t i = 0; i < routing.prefetch_ids.size(); ++i) {
      CHECK_EQ(routing.prefetch_ids[i] == kNoExpert, i < routing.top_k);
    }
  }
}

TEST("recorded predictions do not depend on how a prompt is cut") {
  TempFolder folder;
  const auto path = write_small_model(folder, {});
  const auto predictions = [&](std::int64_t chunk, const char* budget) {
    ModelOptions options;
    options.prefill_chunk = chunk;
    options.experts.budget = budget;
    options.experts.log_events = true;
    return run_live(path, options).routing.prefetch_ids;
  };
  const auto expected = predictions(512, "99%");
  for (const std::int64_t chunk : {1, 7, 23}) CHECK(predictions(chunk, "60%") == expected);
}

}  // namespace moerun::test
