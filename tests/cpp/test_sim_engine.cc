// The simulated link and clock alone, and times worked out by hand.
#include <memory>
#include <numeric>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/record_file.h"
#include "model/model.h"
#include "replay/belady_policy.h"
#include "replay/sim_backend.h"
#include "replay/simulator.h"
#include "small_model.h"
#include "trace/event_log.h"
#include "trace/routing_record.h"

namespace moerun::test {
namespace {

// Every expert takes so many pieces of 100 bytes.
class EvenPieces : public PieceSizes {
 public:
  explicit EvenPieces(std::size_t count) : count_(count) {}
  std::size_t num_pieces(const SegmentRead&) const override { return count_; }
  std::uint64_t piece_bytes(const SegmentRead&, std::size_t) const override { return 100; }
  bool is_direct() const override { return true; }

 private:
  std::size_t count_;
};

std::shared_ptr<Transfer> submit(SimEngine& engine, Urgency urgency) {
  return engine.submit({{0, 0}, 0, 32, {}}, {}, urgency);
}

// One layer, two experts, one of them for each token, and a shared one, which takes a quarter of
// the time; no cache unless `slots`.
struct TwoExperts {
  explicit TwoExperts(std::size_t slots)
      : plan(plan_model(
            write_small_model(
                folder,
                {.layers = 1, .dense_layers = 0, .experts = 2, .top_k = 1, .intermediate = 120}),
            {})) {
    const std::size_t expert = plan.weights->layers[0].bytes_per_expert();
    const std::size_t records = plan.weights->layers[0].experts.intermediate_size;
    layout.policy = "lru";
    layout.prefetch = PrefetchMode::on;
    layout.block_bytes = 128 * plan.weights->layers[0].record_bytes();  // whole quanta
    layout.num_blocks = 4;
    layout.layers = {
        {0, slots, slots != 0 ? records : 0, slots != 0 ? 1.0 : 0.0, slots != 0 ? expert : 0, {}}};
  }

  SimResult run(const std::vector<std::uint16_t>& ids, const std::vector<std::uint16_t>& predicted,
                std::size_t prompt = 0, std::size_t num_pieces = 2) {
    if (predicted.empty()) layout.prefetch = PrefetchMode::off;
    SimOptions options;
    options.sink = &log;
    const SimSequence sequence{ids.size(), prompt, ids, predicted};
    return simulate(*plan.weights, layout, 1, EvenPieces(num_pieces), costs, {&sequence, 1},
                    options);
  }

  TempFolder folder;
  ModelPlan plan;
  CacheLayout layout;
  EventLog log;
  // A piece takes 0.125 + 100 / 100 s, an expert 2.25 s.
  SimCosts costs{{1.0}, {2.0}, {1.5}, 0.5, {0.125, 100}};
};

}  // namespace

TEST("a simulated link moves demand before prefetch, between pieces, on virtual time") {
  const EvenPieces sizes(3);
  Progress progress;
  VirtualClock clock;
  SimEngine engine(sizes, {0.25, 100 / 0.75}, progress, clock);  // a piece takes 1 s
  const auto guess = submit(engine, Urgency::prefetch);
  clock.advance_to(0.5);
  const auto demand = submit(engine, Urgency::demand);
  clock.advance_to(3.9);
  CHECK(!engine.is_complete(*demand));
  CHECK_EQ(engine.bytes_read(*guess), std::uint64_t{100});
  CHECK_EQ(engine.bytes_read(*demand), std::uint64_t{200});
  CHECK_NEAR(engine.stats().busy_seconds, 3.9, 1e-12);
  clock.advance_to(4);  // the piece that was under way, then three of demand
  CHECK(engine.is_complete(*demand));
  CHECK(!engine.is_complete(*guess));
  const auto seen = progress.now();
  while (!engine.is_complete(*guess)) engine.wait(progress, progress.now(), {});
  CHECK_NEAR(clock.now(), 6.0, 1e-12);
  CHECK(progress.now() != seen);
  CHECK_EQ(engine.stats().bytes, std::uint64_t{600});
  clock.advance_to(10);
  CHECK_NEAR(engine.stats().busy_seconds, 6.0, 1e-12);
  CHECK_THROWS(Error, engine.wait(progress, progress.now(), {}), "idle link");
}

TEST("a simulated transfer can be promoted, and cancelled between its pieces") {
  const EvenPieces sizes(2);
  Progress progress;
  VirtualClock clock;
  SimEngine engine(sizes, {0, 100}, progress, clock);
  const auto first = submit(engine, Urgency::prefetch);
  const auto second = submit(engine, Urgency::prefetch);
  engine.promote(second);
  clock.advance_to(3);  // a piece of the first, then the second
  CHECK(engine.is_complete(*second));
  clock.advance_to(3.5);
  const auto third = submit(engine, Urgency::demand);
  engine.drain(third);  // nothing of it is under way
  CHECK_NEAR(clock.now(), 3.5, 1e-12);
  engine.drain(first);
  CHECK_NEAR(clock.now(), 4.0, 1e-12);
  CHECK_EQ(engine.bytes_read(*third), std::uint64_t{0});
  clock.advance_to(9);
  CHECK_EQ(engine.stats().bytes, std::uint64_t{400});
  CHECK_THROWS(InvalidArgument, SimEngine(sizes, {0, 0}, progress, clock), "rate of 1 to");
}

TEST("computing that takes longer beside a busy link, and after waiting") {
  TwoExperts model(1);
  model.costs.slowdown = 0.5;
  // Missed: 1, then 2.25 for the expert, beside which the shared one takes 0.75; 1.5 and 0.5.
  SimResult result = model.run({0, 0}, {});
  CHECK_NEAR(result.token_s[0], 5.25, 1e-12);
  CHECK_NEAR(result.stats.layers[0].stalled_seconds, 1.5, 1e-12);
  CHECK_NEAR(result.token_s[1], 3.5, 1e-12);  // the link is idle
  model.costs.wake_s = 0.25;
  result = model.run({0, 0}, {});
  CHECK_NEAR(result.token_s[0], 5.5, 1e-12);
  CHECK_NEAR(result.token_s[1], 3.5, 1e-12);
  // A wrong guess of expert 1 moves beside the head, and then beside the attention.
  TwoExperts guessing(1);
  guessing.costs.slowdown = 0.5;
  result = guessing.run({0, 0, 0}, {0, 1, 1});
  CHECK_NEAR(result.token_s[0], 5.5, 1e-12);
  CHECK_NEAR(result.token_s[1], 1.5 + 2 + 0.5 * 1.5, 1e-12);
  model.costs.slowdown = -1;
  CHECK_THROWS(InvalidArgument, model.run({0}, {}), "slowdown");
}

TEST("the time of a token is attention, what experts keep it waiting, experts and head") {
  TwoExperts model(1);
  const SimResult result = model.run({0, 0, 1, 0}, {});
  // Missed: 1 + 2.25 + 1.5 + 0.5, for the shared expert is computed meanwhile; a hit: 1 + 2 + 0.5.
  const double expected[] = {5.25, 3.5, 5.25, 5.25};
  for (std::size_t i = 0; i < 4; ++i) CHECK_NEAR(result.token_s[i], expected[i], 1e-12);
  CHECK_NEAR(result.seconds, 19.25, 1e-12);
  CHECK_NEAR(result.stats.layers[0].stalled_seconds, 3 * 1.75, 1e-12);
  CHECK_NEAR(result.stats.decode_seconds, 19.25 - 4 * 0.5, 1e-12);
  CHECK_EQ(result.stats.layers[0].hits, std::uint64_t{1});
  CHECK_EQ(result.stats.layers[0].demand_bytes, std::uint64_t{600});
  CHECK_EQ(result.moved_bytes, std::uint64_t{600});
  CHECK(result.ttft_s.empty());
}

TEST("a right guess hides what it is early, a wrong one costs the piece that is under way") {
  TwoExperts right(0);
  const SimResult hidden = right.run({0, 1, 0}, {kNoExpert, 1, 0});
  CHECK_NEAR(hidden.token_s[0], 5.25, 1e-12);
  // Begun with the head: 2.25 - 0.5 - 1 s are left when it is needed.
  CHECK_NEAR(hidden.token_s[1], 1 + 0.75 + 1.5 + 0.5, 1e-12);
  CHECK_EQ(hidden.stats.layers[0].prefetch_late, std::uint64_t{2});
  CHECK_NEAR(hidden.stats.layers[0].stalled_seconds, 1.75 + 2 * 0.25, 1e-12);

  TwoExperts wrong(0);
  const SimResult delayed = wrong.run({0, 1, 0}, {kNoExpert, 0, 1});
  // Its second piece, under way for 1.5 - 1.125 s, has 0.75 s to go.
  CHECK_NEAR(delayed.token_s[1], 1 + 0.75 + 2.25 + 1.5 + 0.5, 1e-12);
  CHECK_EQ(delayed.stats.layers[0].prefetch_wasted, std::uint64_t{2});
  CHECK_EQ(delayed.stats.layers[0].demand_bytes, std::uint64_t{600});
}

TEST("a prompt goes in chunks, fills empty slots, and is paid for by its tokens") {
  TwoExperts model(1);
  const SimResult result = model.run({0, 1, 1, 1}, {}, 3);
  // 1.5 s a token: 0.5 of attention, which comes first, and 1 of experts, shared or not. At 1.5
  // both experts are asked for, 1 first, which is there at 3.75 and computed until 5.25; 0 is there
  // at 6.
  CHECK_NEAR(result.ttft_s.at(0), 6 + 0.75 + 0.5, 1e-9);
  CHECK_NEAR(result.token_s.at(0), 3.5, 1e-12);  // the prompt uses it most: it has the slot
  CHECK_EQ(result.stats.layers[0].lookups, std::uint64_t{1});
  CHECK_EQ(result.stats.decode_tokens, std::uint64_t{1});
}

TEST("trials on virtual time keep what helps and switch off what does not") {
  std::vector<std::uint16_t> ids;
  std::vector<std::uint16_t> wrong;
  for (int i = 0; i < 100; ++i) {
    ids.push_back(static_cast<std::uint16_t>(i % 2));
    wrong.push_back(static_cast<std::uint16_t>((i + 1) % 2));
  }
  for (const bool is_right : {true, false}) {
    TwoExperts model(0);
    model.layout.prefetch = PrefetchMode::automatic;
    const SimResult result = model.run(ids, is_right ? ids : wrong);
    CHECK_EQ(result.stats.is_prefetching, is_right);
    CHECK(result.stats.reason.find("prefetch measured") == 0);
  }
}

TEST("a simulation refuses what makes no sense, and says what") {
  TwoExperts model(1);
  CHECK_THROWS(InvalidArgument, model.run({0, 2}, {}), "expert_ids", "token 1", "from 0 to 1");
  CHECK_THROWS(InvalidArgument, model.run({0, 1}, {0}), "prefetch_ids", "shape (1, 2, 1)");
  CHECK_THROWS(InvalidArgument, model.run({0, 1}, {0, 2}), "prefetch_ids");
  CHECK_THROWS(InvalidArgument, model.run({0, 1}, {}, 2), "2 tokens", "prompt of 2");
  model.layout.prefetch = PrefetchMode::on;
  const std::vector<std::uint16_t> ids = {0, 1};
  const SimSequence sequence{2, 0, ids, {}};
  const auto simulated = [&](const SimCosts& costs) {
    return simulate(*model.plan.weights, model.layout, 1, EvenPieces(1), costs, {&sequence, 1}, {});
  };
  CHECK_THROWS(InvalidArgument, simulated(model.costs), "--with-prefetch");
  model.layout.prefetch = PrefetchMode::off;
  SimCosts costs = model.costs;
  costs.moe_s = {-1};
  CHECK_THROWS(InvalidArgument, simulated(costs), "moe_s", "-1");
  costs.moe_s = {1, 1};
  CHECK_THROWS(InvalidArgument, simulated(costs), "moe_s", "1 layers");
  costs = model.costs;
  costs.link.bytes_per_s = 0;
  model.layout.is_resident = true;
  CHECK_THROWS(InvalidArgument, simulated(costs), "link_bytes_per_s");
}

TEST("the simulated device takes any amount of address space and computes nothing") {
  SimBackend backend;
  const auto memory = backend.allocate(std::size_t{1} << 40, "a terabyte", MemoryUse::streamed);
  CHECK_EQ(memory->size(), std::size_t{1} << 40);
  CHECK_EQ(backend.allocate(0, "nothing", MemoryUse::shared)->size(), std::size_t{0});
  CHECK_THROWS(OutOfMemory, backend.allocate(std::size_t{1} << 62, "all", MemoryUse::streamed),
               "address space for all");
  const auto stream = backend.make_stream();
  CHECK_THROWS(InvalidArgument, (backend.compute_segments(*stream, {}), 0), "computes nothing");
}

TEST("what a piece takes from files is known without reading it") {
  TempFolder folder;
  const ModelPlan plan = plan_model(MOERUN_TEST_MODEL, {});
  const ModelWeights& weights = *plan.weights;
  const CheckpointStore checkpoint(weights);
  const RecordFileLayout layout(weights, MOERUN_TEST_MODEL);
  write_record_file(weights, layout, folder.path(), {});
  const RecordStore records(weights, layout, layout.path_in(folder.path()));
  const RecordPieces pieces(weights, layout, records.is_direct());
  ReadScratch scratch;
  RandomWeights random(11);
  HostMemory memory(weights.layers[0].bytes_per_expert(), "an expert");
  const std::size_t total = weights.layers[0].experts.intermediate_size;
  const auto check = [&](const ExpertStore& store, const PieceSizes& sizes,
                         const SegmentRead& read) {
    CHECK_EQ(store.num_pieces(read), sizes.num_pieces(read));
    for (std::size_t piece = 0; piece < store.num_pieces(read); ++piece) {
      CHECK_EQ(store.read_piece(read, piece, scratch), sizes.piece_bytes(read, piece));
    }
  };
  for (int round = 0; round < 30; ++round) {
    const std::size_t first = random.below(total / kQuantumRecords + 1) * kQuantumRecords;
    const std::size_t begin = first < total ? first : 0;
    const SegmentRead read{{random.below(8), random.below(32)},
                           begin,
                           total - begin,
                           {{begin, total - begin, memory.data()}}};
    check(checkpoint, checkpoint, read);
    check(records, pieces, read);
  }
}

TEST("belady evicts what is used farthest in the future, then what never is, higher ids first") {
  const std::vector<std::size_t> future = {0, 1, 2, 3, 1, 0};  // two a token
  BeladyPolicy policy(6, 2, future);
  const std::vector<std::size_t> used = {0, 1, 2, 3};
  policy.begin_token();  // the first token: 1 comes before 0 in the last one
  CHECK_EQ(policy.victim(std::vector<std::size_t>{0, 1}), std::size_t{0});
  CHECK_EQ(policy.victim(used), std::size_t{0});
  policy.begin_token();
  CHECK_EQ(policy.victim(used), std::size_t{3});
  const std::vector<std::size_t> all = {0, 1, 2, 3, 4, 5};
  CHECK_EQ(policy.victim(all), std::size_t{5});
  policy.begin_token();
  CHECK_EQ(policy.victim(std::vector<std::size_t>{1, 0}), std::size_t{1});
}

TEST("belady has the most hits of all policies, where a token's experts have room") {
  TempFolder folder;
  const SmallModel size{.layers = 1, .dense_layers = 0, .experts = 10, .top_k = 3};
  const ModelPlan plan = plan_model(write_small_model(folder, size), {});
  const std::size_t expert = plan.weights->layers[0].bytes_per_expert();
  RandomWeights random(4);
  for (int round = 0; round < 60; ++round) {
    const std::size_t tokens = 120;
    std::vector<std::uint16_t> ids;
    const std::size_t favoured = 4 + random.below(7);
    for (std::size_t token = 0; token < tokens; ++token) {
      std::vector<std::uint16_t> of_token;
      while (of_token.size() < 3) {
        const std::size_t among = random.below(4) == 0 ? 10 : favoured;
        const auto id = static_cast<std::uint16_t>(random.below(among));
        if (std::find(of_token.begin(), of_token.end(), id) == of_token.end()) {
          of_token.push_back(id);
        }
      }
      ids.insert(ids.end(), of_token.begin(), of_token.end());
    }
    const SimSequence sequence{tokens, 0, ids, {}};
    CacheLayout layout;
    layout.policy = "lru";
    layout.block_bytes = expert + expert / 3;
    layout.num_blocks = 3;
    layout.layers = {{0,
                      3 + random.below(8),
                      plan.weights->layers[0].experts.intermediate_size,
                      1.0,
                      expert,
                      {}}};
    const auto hits = [&](const std::string& policy) {
      layout.policy = policy == "belady" ? "lru" : policy;
      SimOptions options;
      options.is_belady = policy == "belady";
      EventLog log;
      options.sink = &log;  // the cache stays on
      return simulate(*plan.weights, layout, 3, EvenPieces(1), {{1}, {1}, {1}, 1, {0, 1e3}},
                      {&sequence, 1}, options)
          .stats.layers[0]
          .hits;
    };
    const auto most = hits("belady");
    for (const char* policy : {"lru", "lfu", "lcp"}) CHECK(most >= hits(policy));
  }
}

}  // namespace moerun::test
