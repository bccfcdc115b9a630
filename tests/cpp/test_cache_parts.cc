// The parts of the expert cache alone: policies, layout, trials, transfers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes_text.h"
#include "base/error.h"
#include "check.h"
#include "expert/budget_text.h"
#include "expert/cache_layout.h"
#include "expert/on_off_trial.h"
#include "expert/policy.h"
#include "expert/reader_engine.h"
#include "model/model.h"

namespace moerun::test {
namespace {

// The definition, word by word, on full histories.
std::size_t brute_force_victim(const std::string& policy,
                               const std::vector<std::vector<std::size_t>>& tokens,
                               const std::vector<std::size_t>& candidates) {
  struct Score {
    double key;
    long last_use;
    long negative_index;
    auto operator<=>(const Score&) const = default;
  };
  std::size_t best = 0;
  std::vector<std::pair<Score, std::size_t>> scores;
  for (const std::size_t expert : candidates) {
    double count = 0;
    long last_use = -1;
    long last_token = -1;
    long serial = 0;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      for (const std::size_t used : tokens[t]) {
        ++serial;
        if (used != expert) continue;
        ++count;
        last_use = serial;
        last_token = static_cast<long>(t);
      }
    }
    const double idle = static_cast<double>(static_cast<long>(tokens.size()) - 1 - last_token);
    const double key = policy == "lru"   ? 0
                       : policy == "lfu" ? count
                                         : count * std::pow(0.25, idle / 128);
    scores.push_back({{key, last_use, -static_cast<long>(expert)}, expert});
  }
  best = std::min_element(scores.begin(), scores.end())->second;
  return best;
}

ModelOptions with(const std::string& budget, std::vector<double> split = {}) {
  ModelOptions options;
  options.experts.budget = budget;
  options.experts.split = std::move(split);
  return options;
}

CacheLayout layout_of(const ModelOptions& options) {
  return plan_model(MOERUN_TEST_MODEL, options).memory.layout;
}

// Experts made of bytes that say where they came from.
class PatternStore : public ExpertStore {
 public:
  std::size_t num_pieces(const SegmentRead& read) const override { return read.runs.size(); }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch&) const override {
    order.push_back(read.id.expert);
    std::memset(read.runs[piece].data, static_cast<int>(read.id.expert), 16);
    return 16;
  }
  bool is_direct() const override { return true; }
  mutable std::vector<std::size_t> order;  // with one thread
};

}  // namespace

TEST("policies choose the victim that their definition names") {
  std::mt19937 random(3);
  for (const std::string policy : {"lru", "lfu", "lcp"}) {
    for (int round = 0; round < 20; ++round) {
      const std::size_t num_experts = 6;
      const auto live = make_cache_policy(policy, num_experts);
      std::vector<std::vector<std::size_t>> tokens;
      std::vector<std::size_t> all = {0, 1, 2, 3, 4, 5};
      for (int t = 0; t < 30; ++t) {
        std::shuffle(all.begin(), all.end(), random);
        tokens.push_back({all[0], all[1]});
        live->begin_token();
        live->access(all[0]);
        live->access(all[1]);
        std::vector<std::size_t> candidates(all.begin() + 2, all.end());
        CHECK_EQ(live->victim(candidates), brute_force_victim(policy, tokens, candidates));
      }
    }
  }
}

TEST("the static policy admits its list and nothing else") {
  PolicyParams params;
  params.static_experts = {1, 3};
  const auto policy = make_cache_policy("static", 4, params);
  CHECK(policy->admits(1) && policy->admits(3));
  CHECK(!policy->admits(0) && !policy->admits(2));
  params.static_experts = {4};
  CHECK_THROWS(InvalidArgument, make_cache_policy("static", 4, params), "0 to 3", "4");
  CHECK_THROWS(InvalidArgument, make_cache_policy("mru", 4), "lru", "mru");
}

TEST("budgets are read in every unit, and nonsense is refused") {
  CHECK_EQ(parse_budget("25%", 1000), std::size_t{250});
  CHECK_EQ(parse_budget("100%", 1000), std::size_t{1000});
  CHECK_EQ(parse_budget("6GiB", 1), std::size_t{6} << 30);
  CHECK_EQ(parse_budget("1.5 GB", 1), std::size_t{1'500'000'000});
  CHECK_EQ(parse_budget("500MB", 1), std::size_t{500'000'000});
  CHECK_EQ(parse_budget("12345", 1), std::size_t{12345});
  for (const char* text : {"", "abc", "-5", "0", "0%", "101%", "nan", "inf", "5 apples", "1e30",
                           "6GiBs", "%", "12.5.3"}) {
    CHECK_THROWS(InvalidArgument, parse_budget(text, 1000), "expert_budget", text);
  }
}

TEST("no layout takes more than its budget, and none wastes a slot's worth of it") {
  std::mt19937 random(11);
  const std::size_t total = plan_model(MOERUN_TEST_MODEL, {}).weights->expert_bytes();
  for (int round = 0; round < 60; ++round) {
    const std::size_t budget = 400'000 + random() % total;
    std::vector<double> split;
    if (round % 3 != 0) split = {static_cast<double>(random() % 101) / 100};
    const CacheLayout layout = layout_of(with(std::to_string(budget), split));
    if (layout.is_resident) {
      CHECK(budget >= total);
      continue;
    }
    CHECK(layout.arena_bytes() <= budget);
    CHECK(layout.smallest_budget_bytes <= budget);
    for (const LayerLayout& layer : layout.layers) {
      CHECK(layer.num_slots <= 32);
      CHECK(layer.top_records % kQuantumRecords == 0 || layer.split == 1.0);
      const bool room_for_one = layout.arena_bytes() + layer.slot_bytes <= budget;
      if (layer.slot_bytes != 0 && layer.num_slots < 32) CHECK(!room_for_one);
    }
  }
}

TEST("a budget below one token's needs names the smallest that works, which then works") {
  const std::size_t smallest = layout_of(with("50%")).smallest_budget_bytes;
  CHECK_THROWS(OutOfMemory, layout_of(with(std::to_string(smallest - 1))),
               bytes_text(smallest, Rounding::up), "smallest budget that works");
  CHECK_EQ(layout_of(with(std::to_string(smallest))).arena_bytes(), smallest);
}

TEST("contradictory options are refused") {
  ModelOptions options = with("50%", {0.5});
  options.experts.policy = "off";
  CHECK_THROWS(InvalidArgument, layout_of(options), "policy off");
  options = with("50%");
  options.experts.policy = "off";
  options.experts.prefetch = "on";
  CHECK_THROWS(InvalidArgument, layout_of(options), "prefetch");
  options = with("50%");
  options.experts.policy = "static";
  CHECK_THROWS(InvalidArgument, layout_of(options), "plan");
  CHECK_THROWS(InvalidArgument, layout_of(with("50%", {0.5, 0.5})), "8 layers", "2");
  CHECK_THROWS(InvalidArgument, layout_of(with("50%", {1.5})), "0 to 1", "1.5");
}

TEST("a trial keeps what is faster and looks again") {
  OnOffTrial trial({.warm_up_tokens = 4, .window_tokens = 4, .rounds = 2, .hold_tokens = 10});
  const auto run = [&](int tokens, double on, double off) {
    int num_on = 0;
    for (int i = 0; i < tokens; ++i) {
      num_on += trial.is_on();
      trial.record(trial.is_on() ? on : off);
    }
    return num_on;
  };
  CHECK_EQ(run(4, 1, 2), 4);
  CHECK(!trial.has_outcome());
  CHECK_EQ(run(16, 3, 2), 8);  // on, off, on, off
  CHECK(trial.has_outcome() && !trial.is_worth_it());
  CHECK_EQ(run(10, 3, 2), 0);
  CHECK_EQ(run(16, 1, 2), 8);  // things have changed
  CHECK(trial.is_worth_it());
  CHECK_EQ(run(10, 1, 2), 10);
}

TEST("demand overtakes prefetch, and a cancelled transfer gives its room back") {
  Progress progress;
  std::vector<std::byte> memory(8 * 64);
  StagingRing ring(memory, 64, progress);
  PatternStore store;
  // No thread yet: a blocked store would be needed to look at the queue with one.
  class Gate : public PatternStore {
   public:
    std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                             ReadScratch& scratch) const override {
      while (!open.load()) std::this_thread::yield();
      return PatternStore::read_piece(read, piece, scratch);
    }
    std::atomic<bool> open{false};
  } gate;
  {
    ReaderEngine engine(gate, progress, 1);
    const auto submit = [&](std::size_t expert, Urgency urgency) {
      auto blocks = ring.try_take(1);
      SegmentRead read{{0, expert}, 0, 1, {{0, 1, ring.block(blocks->indices()[0])}}};
      return engine.submit(std::move(read), std::move(*blocks), urgency);
    };
    const auto first = submit(1, Urgency::demand);  // under way, waiting at the gate
    while (engine.stats().busy_seconds == 0) std::this_thread::yield();
    auto guess = submit(2, Urgency::prefetch);
    auto late = submit(3, Urgency::prefetch);
    auto wrong = submit(4, Urgency::prefetch);
    const auto needed = submit(5, Urgency::demand);
    CHECK_EQ(ring.num_free(), std::size_t{3});
    engine.promote(late);
    engine.cancel(wrong);
    wrong.reset();
    CHECK_EQ(ring.num_free(), std::size_t{4});
    gate.open = true;
    for (const auto& transfer : {first, guess, late, needed}) {
      for (;;) {
        const auto seen = progress.now();
        if (engine.is_complete(*transfer)) break;
        progress.wait_beyond(seen);
      }
    }
    CHECK((gate.order == std::vector<std::size_t>{1, 5, 3, 2}));
  }
  CHECK_EQ(ring.num_free(), std::size_t{8});
}

}  // namespace moerun::test
