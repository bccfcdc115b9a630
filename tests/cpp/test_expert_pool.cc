// Memory that all layers share: what is in it, and who goes first.
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/expert_pool.h"

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

// Certain that these are used, and no others.
PathForecast forecast_of(const Experts& first, const Experts& second) {
  PathForecast forecast;
  forecast.now.assign(kLayers * kExperts, 0.0F);
  for (const std::size_t expert : first) forecast.now[expert] = 1.0F;
  for (const std::size_t expert : second) forecast.now[kExperts + expert] = 1.0F;
  return forecast;
}

}  // namespace

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
  next_use.expect(forecast_of({1}, {2}));
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

}  // namespace moerun::test
