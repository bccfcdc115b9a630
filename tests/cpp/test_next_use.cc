// When experts will be used again.
#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "expert/next_use.h"

namespace moerun::test {
namespace {

using Experts = std::vector<std::size_t>;

constexpr std::size_t kLayers = 3;
constexpr std::size_t kExperts = 4;

// Chances of a few, nothing of the others.
std::vector<float> chances(const std::map<std::pair<std::size_t, std::size_t>, float>& known) {
  std::vector<float> all(kLayers * kExperts, 0.0F);
  for (const auto& [place, chance] : known) all[place.first * kExperts + place.second] = chance;
  return all;
}

void run_all(NextUse& next_use, const Experts& experts, int steps = 1) {
  for (int step = 0; step < steps; ++step) {
    next_use.begin_step();
    for (std::size_t layer = 0; layer < kLayers; ++layer) next_use.run(layer, experts);
  }
}

}  // namespace

TEST("next use: nothing is known, so that layers come in the order in which they run") {
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  for (std::size_t layer = 0; layer + 1 < kLayers; ++layer) {
    CHECK(next_use.moment(layer, 0) < next_use.moment(layer + 1, 3));
    CHECK_EQ(next_use.moment(layer, 0), next_use.moment(layer, 3));
    CHECK_NEAR(next_use.moment_after(layer, 0), next_use.moment(layer, 0) + kLayers, 1e-9);
  }
  // One that has run comes after all that have not.
  next_use.run(0, Experts{});
  CHECK(next_use.moment(0, 0) > next_use.moment(2, 0));
  next_use.run(1, Experts{});
  CHECK(next_use.moment(1, 0) > next_use.moment(0, 0));
}

TEST("next use: a forecast of the step is the order, until the layer has run") {
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  next_use.expect({chances({{{0, 1}, 1.0F}, {{1, 2}, 1.0F}, {{1, 3}, 0.5F}}), {}});
  CHECK_EQ(next_use.chance(1, 3), 0.5);
  const double begin = next_use.moment(0, 1);
  CHECK_NEAR(next_use.moment(1, 2), begin + 1, 1e-9);
  CHECK(next_use.moment(1, 2) < next_use.moment(1, 3));
  CHECK(next_use.moment(1, 3) < next_use.moment(1, 0));
  // Half of the steps used it so far, so that the one after the next comes 2 steps later.
  CHECK_NEAR(next_use.moment(1, 0), begin + 1 + 2 * kLayers, 1e-9);
  CHECK_NEAR(next_use.moment(1, 3), begin + 1 + 0.5 * 2 * kLayers, 1e-9);
  // What will certainly be used in a late layer still comes before what will hardly be.
  CHECK(next_use.moment(1, 2) < next_use.moment(0, 0));

  next_use.run(1, Experts{2});
  CHECK(next_use.chance(1, 2) < 1);
  CHECK(next_use.moment(1, 2) > begin + 1 + kLayers);
  CHECK(next_use.moment(1, 2) < next_use.moment(1, 3));  // by how often they are used
}

TEST("next use: what is known of the step after is known of that step when it begins") {
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  const auto now = chances({{{2, 0}, 0.25F}});
  const auto next = chances({{{0, 3}, 1.0F}, {{2, 0}, 0.75F}});
  next_use.expect({now, next});
  CHECK_EQ(next_use.chance(0, 3), 0.0);
  const double turn = next_use.moment_after(0, 3);
  next_use.run(0, Experts{});
  CHECK_EQ(next_use.chance(0, 3), 1.0);
  CHECK_NEAR(next_use.moment(0, 3), turn, 1e-9);  // the same turn, as certain
  CHECK_EQ(next_use.chance(2, 0), 0.25);
  next_use.begin_step();
  CHECK_EQ(next_use.chance(0, 3), 1.0);
  CHECK_EQ(next_use.chance(2, 0), 0.75);
  CHECK_NEAR(next_use.moment(0, 3), turn, 1e-9);
  next_use.begin_step();  // nothing was known of this one
  CHECK(next_use.chance(0, 3) < 1);
}

TEST("next use: experts that a router names count in the layer's next turn") {
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  next_use.run(0, Experts{0});
  next_use.expect(1, Experts{3});
  CHECK(next_use.chance(1, 3) > 0.7);
  CHECK_EQ(next_use.chance(1, 2), 0.5);  // as before
  next_use.run(1, Experts{3});
  next_use.run(2, Experts{0});
  CHECK(next_use.chance(1, 3) < 0.7);
  // At the end of a step the first layer of the next one is named.
  next_use.expect(0, Experts{2});
  CHECK(next_use.chance(0, 2) > 0.7);
  const double moment = next_use.moment(0, 2);
  next_use.begin_step();
  CHECK(next_use.chance(0, 2) > 0.7);
  CHECK_NEAR(next_use.moment(0, 2), moment, 1e-9);
  CHECK(next_use.chance(1, 3) < 0.7);
  // A chance that is known to be larger is not made smaller.
  next_use.expect({chances({{{1, 1}, 1.0F}}), {}});
  next_use.expect(1, Experts{0, 1});
  CHECK_EQ(next_use.chance(1, 1), 1.0);
  CHECK(next_use.chance(1, 0) > 0.7);
}

TEST("next use: how often experts are used is learned and forgotten") {
  NextUse next_use(kLayers, kExperts);
  run_all(next_use, Experts{0}, 200);
  CHECK_NEAR(next_use.chance(1, 0), 1, 0.01);
  CHECK_NEAR(next_use.chance(1, 1), 0, 0.01);
  CHECK(next_use.moment(1, 0) < next_use.moment(1, 1));
  CHECK(next_use.moment(2, 0) < next_use.moment(0, 1));
  const double never = next_use.moment(0, 1) - next_use.moment(0, 0);
  CHECK(never > 100 * kLayers && never < 1e6);
  run_all(next_use, Experts{1}, 60);
  CHECK(next_use.chance(1, 1) > 0.9 && next_use.chance(1, 0) < 0.1);
  CHECK(next_use.moment(1, 1) < next_use.moment(1, 0));
}

// Experts of fixed chances, independent of each other: the moments that were expected are in the
// mean those of their next use, but for what the estimates of the chances scatter.
TEST("next use: the expected moment is the mean of a long random sequence") {
  const std::vector<float> share = {0.3F, 0.4F, 0.6F, 0.9F};
  NextUse next_use(1, kExperts);
  std::mt19937 random(4);
  std::uniform_real_distribution<float> uniform;
  struct Sum {
    std::vector<double> expected;  // since the last use
    double too_late = 0;
    double count = 0;
  };
  std::vector<Sum> sums(kExperts);
  for (int step = 1; step <= 20000; ++step) {
    next_use.begin_step();  // which is at `step`, for there is one layer
    Experts used;
    for (std::size_t expert = 0; expert < kExperts; ++expert) {
      if (uniform(random) >= share[expert]) continue;
      used.push_back(expert);
      Sum& sum = sums[expert];
      for (const double expected : sum.expected) sum.too_late += expected - step;
      sum.count += static_cast<double>(sum.expected.size());
      sum.expected.clear();
    }
    next_use.run(0, used);
    next_use.expect({{}, share});
    if (step < 500) continue;
    for (std::size_t expert = 0; expert < kExperts; ++expert) {
      sums[expert].expected.push_back(next_use.moment(0, expert));
    }
  }
  for (std::size_t expert = 0; expert < kExperts; ++expert) {
    CHECK(sums[expert].count > 10000);
    const double mean_wait = 1.0 / static_cast<double>(share[expert]);
    CHECK_NEAR(sums[expert].too_late / sums[expert].count, 0, 0.15 * mean_wait);
  }
}

TEST("next use: lists of another length are refused, and nothing changes") {
  NextUse next_use(kLayers, kExperts);
  next_use.begin_step();
  next_use.expect({chances({{{0, 1}, 1.0F}}), {}});
  const std::vector<float> short_list(kLayers * kExperts - 1, 1.0F);
  CHECK_THROWS(InvalidArgument, next_use.expect({short_list, {}}), "3 x 4", "11");
  CHECK_THROWS(InvalidArgument, next_use.expect({{}, short_list}), "3 x 4", "11");
  CHECK_EQ(next_use.chance(0, 1), 1.0);
  CHECK_EQ(next_use.chance(0, 2), 0.0);
}

}  // namespace moerun::test
