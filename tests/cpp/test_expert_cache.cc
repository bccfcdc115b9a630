// The expert cache under a model: same bits as without it, whatever the disk does.
#include <atomic>
#include <chrono>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/model.h"
#include "model/stats.h"

namespace moerun::test {
namespace {

const char* const kModel = MOERUN_TEST_MODEL;

// A disk that is slow, answers in any order, and fails.
class FaultyStore : public ExpertStore {
 public:
  struct Faults {
    int max_delay_us = 0;
    int fail_every = 0;  // the first attempt of every n-th piece
    bool fails_always = false;
  };
  FaultyStore(std::unique_ptr<ExpertStore> inner, const Faults& faults)
      : inner_(std::move(inner)), faults_(faults) {}

  std::size_t num_pieces(const SegmentRead& read) const override {
    return inner_->num_pieces(read);
  }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override {
    const int call = calls_.fetch_add(1);
    if (faults_.max_delay_us != 0) {
      std::this_thread::sleep_for(
          std::chrono::microseconds(call * 7919 % (faults_.max_delay_us + 1)));
    }
    static thread_local bool has_just_failed = false;
    const bool fails =
        !has_just_failed && faults_.fail_every != 0 && call % faults_.fail_every == 0;
    has_just_failed = fails;
    if (fails || (faults_.fails_always && call > 40)) {
      throw FileError("injected: the disk has a bad day");
    }
    return inner_->read_piece(read, piece, scratch);
  }
  bool is_direct() const override { return inner_->is_direct(); }

 private:
  std::unique_ptr<ExpertStore> inner_;
  Faults faults_;
  mutable std::atomic<int> calls_{1};
};

ModelOptions with_faults(ModelOptions options, const FaultyStore::Faults& faults) {
  options.experts.wrap_store = [faults](std::unique_ptr<ExpertStore> inner) {
    return std::make_unique<FaultyStore>(std::move(inner), faults);
  };
  return options;
}

std::vector<std::int32_t> some_tokens(std::size_t count) {
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(i * 37 % 4096));
  return ids;
}

// A prompt and some decoded tokens: the tokens, and the hash of the logits after every one.
struct Text {
  std::vector<std::int32_t> tokens;
  std::vector<std::uint64_t> hashes;
  bool operator==(const Text&) const = default;
};

Text generate(const std::shared_ptr<Model>& model, std::size_t prompt, std::size_t count) {
  Text text;
  Generation generation(model, some_tokens(prompt), {{}, count, {}});
  while (const auto token = generation.next()) {
    text.tokens.push_back(*token);
    text.hashes.push_back(generation.stats().logits_hash);
  }
  return text;
}

void run_to_its_end(Generation& generation, const Checkpointer& between_layers = {}) {
  while (generation.next(between_layers)) {
  }
}

CacheCounters total_of(const Model& model) {
  CacheCounters total;
  for (const auto& layer : model.expert_cache()->stats().layers) total += layer;
  return total;
}

std::string smallest_budget() {
  ModelOptions options;
  options.experts.budget = "50%";
  return std::to_string(plan_model(kModel, options).memory.layout.smallest_budget_bytes);
}

}  // namespace

TEST("text and logits have the same bits for any budget, split, policy, prefetch, ring and disk") {
  const Text reference = generate(Model::load(kModel, {}), 23, 12);
  const std::vector<std::string> budgets = {smallest_budget(), "7%", "25%", "50%", "99%", "100%"};
  const std::vector<std::string> policies = {"lru", "lfu", "lcp"};
  const std::vector<std::vector<double>> splits = {
      {}, {0.0}, {0.25}, {0.4}, {1.0}, {0, 0.25, 0.4, 1, 0.7, 0.5, 1, 0.1}};
  std::mt19937 random(7);
  const auto pick = [&](const auto& choices) { return choices[random() % choices.size()]; };
  for (int round = 0; round < 40; ++round) {
    ModelOptions options;
    options.threads = 1 + static_cast<int>(random() % 4);
    options.prefill_chunk = 1 + static_cast<int>(random() % 30);
    options.experts.budget = pick(budgets);
    options.experts.policy = round % 7 == 0 ? "off" : pick(policies);
    if (options.experts.policy != "off") {
      options.experts.split = pick(splits);
      options.experts.prefetch = pick(std::vector<std::string>{"on", "off", "auto"});
    }
    options.experts.reader_threads = 1 + static_cast<int>(random() % 3);
    options.experts.ring_experts = round % 3 == 0 ? 1 + random() % 3 : 0;
    FaultyStore::Faults faults;
    faults.max_delay_us = round % 2 == 0 ? 300 : 0;
    faults.fail_every = round % 4 == 0 ? 5 : 0;
    const auto model = Model::load(kModel, with_faults(options, faults));
    const Text text = generate(model, 23, 12);
    if (text != reference) {
      fail(__FILE__, __LINE__, "round ", round, ": budget ", options.experts.budget, ", policy ",
           options.experts.policy, ", prefetch ", options.experts.prefetch, ": other logits");
    }
    if (model->expert_cache() == nullptr) continue;
    const CacheCounters total = total_of(*model);
    CHECK_EQ(total.hits + total.top_hits + total.misses, total.lookups);
    CHECK_EQ(total.lookups, std::uint64_t{11 * 8 * 4});
  }
}

TEST("a layer's prefetches do not starve the demand of a tiny ring") {
  const Text reference = generate(Model::load(kModel, {}), 9, 10);
  ModelOptions options;
  options.experts.budget = "30%";
  options.experts.prefetch = "on";
  options.experts.split = {1.0};
  for (const std::size_t ring : {1, 2, 5, 9}) {
    options.experts.ring_experts = ring;
    CHECK(generate(Model::load(kModel, with_faults(options, {500, 0, false})), 9, 10) == reference);
  }
}

TEST("a disk that keeps failing ends the generation, and the model stays usable or says so") {
  ModelOptions options;
  options.experts.budget = "20%";
  const auto model = Model::load(kModel, with_faults(options, {0, 0, true}));
  for (int i = 0; i < 3; ++i) {
    Generation generation(model, some_tokens(9), {{}, 10, {}});
    CHECK_THROWS(FileError, run_to_its_end(generation), "bad day");
    CHECK(!generation.next().has_value());
  }
}

TEST("a failure leaves no slot that claims what it does not hold") {
  const Text reference = generate(Model::load(kModel, {}), 9, 10);
  ModelOptions options;
  options.experts.budget = "40%";
  options.experts.split = {1.0};
  for (int failing = 1; failing < 400; failing += 37) {
    auto broken = std::make_shared<std::atomic<int>>(failing);
    // Fails a piece and its second attempt once, somewhere.
    class OnceBroken : public ExpertStore {
     public:
      OnceBroken(std::unique_ptr<ExpertStore> inner, std::shared_ptr<std::atomic<int>> left)
          : inner_(std::move(inner)), left_(std::move(left)) {}
      std::size_t num_pieces(const SegmentRead& read) const override {
        return inner_->num_pieces(read);
      }
      std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                               ReadScratch& scratch) const override {
        const int left = left_->fetch_sub(1);
        if (left == 0 || left == -1) throw FileError("injected");
        return inner_->read_piece(read, piece, scratch);
      }
      bool is_direct() const override { return inner_->is_direct(); }

     private:
      std::unique_ptr<ExpertStore> inner_;
      std::shared_ptr<std::atomic<int>> left_;
    };
    options.experts.reader_threads = 1;
    options.experts.wrap_store = [&](std::unique_ptr<ExpertStore> inner) {
      return std::make_unique<OnceBroken>(std::move(inner), broken);
    };
    const auto model = Model::load(kModel, options);
    try {
      generate(model, 9, 10);
    } catch (const FileError&) {
    }
    CHECK(generate(model, 9, 10) == reference);
  }
}

TEST("an interruption between layers, with prefetches under way, leaves the cache whole") {
  const Text reference = generate(Model::load(kModel, {}), 9, 10);
  ModelOptions options;
  options.experts.budget = "30%";
  const auto model = Model::load(kModel, with_faults(options, {200, 0, false}));
  for (int stop_at = 1; stop_at < 20; stop_at += 3) {
    Generation generation(model, some_tokens(9), {{}, 10, {}});
    int calls = 0;
    const auto stop = [&] {
      if (++calls == stop_at) throw Interrupted("stop");
    };
    CHECK_THROWS(Interrupted, run_to_its_end(generation, stop), "stop");
  }
  CHECK(generate(model, 9, 10) == reference);
}

TEST("a generation that waits for a disk can be interrupted") {
  class StuckStore : public ExpertStore {
   public:
    StuckStore(std::unique_ptr<ExpertStore> inner, std::atomic<bool>& is_stuck)
        : inner_(std::move(inner)), is_stuck_(is_stuck) {}
    std::size_t num_pieces(const SegmentRead& read) const override {
      return inner_->num_pieces(read);
    }
    std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                             ReadScratch& scratch) const override {
      while (is_stuck_) std::this_thread::yield();
      return inner_->read_piece(read, piece, scratch);
    }
    bool is_direct() const override { return inner_->is_direct(); }

   private:
    std::unique_ptr<ExpertStore> inner_;
    std::atomic<bool>& is_stuck_;
  };
  const Text reference = generate(Model::load(kModel, {}), 9, 10);
  std::atomic<bool> is_stuck{true};
  ModelOptions options;
  options.experts.budget = "30%";
  options.experts.wrap_store = [&](std::unique_ptr<ExpertStore> inner) {
    return std::make_unique<StuckStore>(std::move(inner), is_stuck);
  };
  const auto model = Model::load(kModel, options);
  Generation generation(model, some_tokens(9), {{}, 10, {}});
  const auto give_up = [&] {
    is_stuck = false;
    throw Interrupted("stop");
  };
  CHECK_THROWS(Interrupted, generation.next(give_up), "stop");
  CHECK(generate(model, 9, 10) == reference);
}

TEST("without slots every layer is prefetched, and guesses come true") {
  for (const std::string& budget : {smallest_budget(), std::string("50%")}) {
    ModelOptions options;
    options.experts.budget = budget;
    options.experts.split = {0.0};
    options.experts.prefetch = "on";
    const auto model = Model::load(kModel, options);
    generate(model, 9, 20);
    for (const auto& layer : model->expert_cache()->stats().layers) {
      CHECK(layer.prefetch_issued > 19);
      CHECK(layer.prefetch_useful + layer.prefetch_late > 0);
      CHECK(layer.prefetch_bytes >= layer.wasted_bytes);
    }
  }
}

TEST("the bits are the same while trials switch cache and prefetch on and off") {
  const Text reference = generate(Model::load(kModel, {}), 9, 60);
  ModelOptions options;
  options.experts.split = {0.6};
  const OnOffTrial::Params eager = {
      .warm_up_tokens = 2, .window_tokens = 2, .rounds = 1, .hold_tokens = 3};
  options.experts.prefetch_trial = eager;
  options.experts.cache_trial = eager;
  for (const char* budget : {"8%", "20%", "60%"}) {
    for (const double tolerance : {-1.0, 1e9}) {  // nothing is, or everything is worth it
      options.experts.budget = budget;
      options.experts.prefetch_trial.tolerance = tolerance;
      options.experts.cache_trial.tolerance = -tolerance;
      const auto model = Model::load(kModel, options);
      CHECK(generate(model, 9, 60) == reference);
      const CacheStats stats = model->expert_cache()->stats();
      CHECK_EQ(stats.is_prefetching, tolerance > 0);
    }
  }
}

TEST("slots hold experts whole where the split is 1, also of odd sizes") {
  const ModelPlan plan = plan_model(kModel, {});
  ExpertCacheOptions options;
  options.budget = "50%";
  options.split = {1.0};
  for (const LayerLayout& layer : make_cache_layout(*plan.weights, 4, options, 0).layers) {
    CHECK_EQ(layer.top_records, plan.weights->layers[layer.layer].experts.intermediate_size);
  }
  options.split = {0.001};
  for (const LayerLayout& layer : make_cache_layout(*plan.weights, 4, options, 0).layers) {
    CHECK_EQ(layer.top_records, kQuantumRecords);
  }
}

TEST("the prompt takes no slot away from decoding") {
  ModelOptions options;
  options.experts.budget = "30%";
  options.experts.split = {1.0};
  options.experts.log_events = true;
  options.experts.prefetch = "off";
  const auto model = Model::load(kModel, options);
  generate(model, 200, 1);  // fills the empty slots
  const std::size_t before = model->cache_events().size();
  generate(model, 200, 1);
  CHECK_EQ(model->cache_events().size(), before);
}

TEST("the event log agrees with the counters") {
  ModelOptions options;
  options.experts.budget = "25%";
  options.experts.log_events = true;
  const auto model = Model::load(kModel, options);
  generate(model, 12, 30);
  const CacheCounters total = total_of(*model);
  std::uint64_t count[9] = {};
  for (const CacheEvent& event : model->cache_events()) ++count[static_cast<int>(event.kind)];
  CHECK_EQ(count[0], total.hits);
  CHECK_EQ(count[1], total.top_hits);
  CHECK_EQ(count[2], total.misses);
  CHECK_EQ(count[5], total.prefetch_issued);
  CHECK_EQ(count[6], total.prefetch_useful);
  CHECK_EQ(count[7], total.prefetch_late);
  CHECK_EQ(count[8], total.prefetch_wasted);
}

TEST("two threads use a cached model and a third reads its statistics") {
  const Text reference = generate(Model::load(kModel, {}), 9, 10);
  ModelOptions options;
  options.experts.budget = "30%";
  const auto model = Model::load(kModel, options);
  std::atomic<bool> is_over{false};
  std::atomic<int> num_wrong{0};
  const auto work = [&] {
    for (int i = 0; i < 3; ++i) {
      if (generate(model, 9, 10) != reference) ++num_wrong;
    }
  };
  std::thread first(work);
  std::thread second(work);
  std::thread reader([&] {
    while (!is_over) stats_json(*model);
  });
  first.join();
  second.join();
  is_over = true;
  reader.join();
  CHECK_EQ(num_wrong.load(), 0);
}

}  // namespace moerun::test
