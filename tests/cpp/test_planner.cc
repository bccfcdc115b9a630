// The cost model at its edges, and plans against every plan that there is.
#include "plan/planner.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "plan/cost_model.h"

namespace moerun::test {
namespace {

double uniform_real(std::mt19937& random, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random);
}

// Concave as of real models, steps, or anything that does not fall.
std::vector<double> random_curve(std::mt19937& random, std::size_t experts) {
  std::vector<double> curve(experts + 1, 0);
  const double shape = uniform_real(random, 0.2, 3);
  const auto kind = random() % 3;
  for (std::size_t n = 1; n <= experts; ++n) {
    const double share = static_cast<double>(n) / static_cast<double>(experts);
    if (kind == 0) curve[n] = std::pow(share, shape);
    if (kind == 1) curve[n] = random() % 4 == 0 ? uniform_real(random, 0, 1) : 0;
    if (kind == 2) curve[n] = uniform_real(random, 0, share);
  }
  std::partial_sum(curve.begin(), curve.end(), curve.begin(),
                   [](double a, double b) { return std::max(a, b); });
  return curve;
}

LayerModel random_layer(std::mt19937& random, std::size_t experts, std::size_t quanta) {
  LayerModel layer;
  layer.num_experts = experts;
  layer.top_k = 1 + random() % std::min<std::size_t>(experts, 8);
  layer.quantum_records = 32;
  layer.records = quanta * 32;
  layer.record_bytes = 128;
  layer.attention_s = uniform_real(random, 0, 1e-3);
  layer.moe_s = uniform_real(random, 0, 1e-3);
  layer.prompt_s = uniform_real(random, 0, 1e-4);
  layer.hit_rate = random_curve(random, experts);
  if (random() % 2 == 0) {
    for (std::size_t r = 0; r < layer.top_k; ++r) {
      layer.correctness.push_back(uniform_real(random, 0, 1));
    }
  }
  return layer;
}

PlanProblem random_problem(std::mt19937& random, std::size_t layers, std::size_t experts,
                           std::size_t quanta) {
  PlanProblem problem;
  for (std::size_t l = 0; l < layers; ++l) {
    problem.layers.push_back(random_layer(random, experts, quanta));
  }
  problem.head_s = uniform_real(random, 0, 1e-3);
  const double expert_s = std::pow(10, uniform_real(random, -5, -2));
  problem.link.bytes_per_s = problem.layers[0].expert_bytes() / expert_s;
  problem.link.fixed_s = random() % 2 == 0 ? 0 : uniform_real(random, 0, 2e-5);
  set_windows(problem.layers, problem.head_s);
  return problem;
}

std::size_t random_bytes(std::mt19937& random, const Planner& planner) {
  const double share = uniform_real(random, 0, 1);
  return static_cast<std::size_t>(share * share * static_cast<double>(planner.total_bytes()));
}

TEST("fit_transfer: finds the line that made the samples, and none where there is none") {
  std::vector<TransferSample> samples;
  for (const double bytes : {1e5, 1e6, 1e7, 1e8}) samples.push_back({bytes, 2e-5 + bytes / 12e9});
  const TransferCost link = fit_transfer(samples);
  CHECK_NEAR(link.fixed_s, 2e-5, 1e-12);
  CHECK_NEAR(link.bytes_per_s / 12e9, 1.0, 1e-9);
  CHECK_EQ(link.seconds({}), 0.0);
  CHECK_NEAR(link.seconds({1, 12e6}), 1e-3 + 2e-5, 1e-12);
  CHECK_NEAR(link.seconds({3, 12e6}), 1e-3 + 6e-5, 1e-12);
  // A line that would start below 0 starts at 0.
  const std::vector<TransferSample> bent = {{1e6, 1e-4}, {2e6, 3e-4}};
  CHECK_EQ(fit_transfer(bent).fixed_s, 0.0);
  CHECK(fit_transfer(bent).bytes_per_s > 2e6 / 3e-4);
  CHECK(fit_transfer(bent).bytes_per_s < 1e6 / 1e-4);
  const std::vector<TransferSample> one_size = {{1e6, 1e-4}, {1e6, 3e-4}};
  CHECK_THROWS(InvalidArgument, fit_transfer(one_size), "two sizes");
  CHECK_THROWS(InvalidArgument, fit_transfer({}), "two sizes");
  const std::vector<TransferSample> falling = {{1e6, 3e-4}, {2e6, 1e-4}};
  CHECK_THROWS(InvalidArgument, fit_transfer(falling), "no longer");
  const std::vector<TransferSample> negative = {{1e6, -1e-4}, {2e6, 1e-4}};
  CHECK_THROWS(InvalidArgument, fit_transfer(negative), "above 0");
}

TEST("fit_transfer: each piece takes the fixed time") {
  std::vector<TransferSample> samples;
  for (const auto& [bytes, pieces] : {std::pair{1e5, 3.0}, {2e5, 6.0}, {3e5, 5.0}, {9e5, 12.0}}) {
    samples.push_back({bytes, pieces * 2e-5 + bytes / 3e9, pieces});
  }
  const TransferCost link = fit_transfer(samples);
  CHECK_NEAR(link.fixed_s, 2e-5, 1e-12);
  CHECK_NEAR(link.bytes_per_s / 3e9, 1.0, 1e-9);
  // Twice as many pieces of the same size tell nothing about how time divides.
  const std::vector<TransferSample> alike = {{1e5, 1e-4, 1}, {2e5, 2e-4, 2}};
  CHECK_THROWS(InvalidArgument, fit_transfer(alike), "two sizes");
  const std::vector<TransferSample> none = {{1e5, 1e-4, 0}, {2e5, 2e-4, 2}};
  CHECK_THROWS(InvalidArgument, fit_transfer(none), "pieces above 0");
}

LayerModel simple_layer() {
  LayerModel layer;
  layer.num_experts = 4;
  layer.top_k = 2;
  layer.quantum_records = 32;
  layer.records = 64;
  layer.record_bytes = 100;
  layer.attention_s = 1;
  layer.moe_s = 2;
  layer.hit_rate = {0, 0.25, 0.5, 0.75, 1};
  return layer;
}

TEST("estimate_layer: worked by hand") {
  LayerModel layer = simple_layer();
  const TransferCost link{0, 6400};  // an expert a second
  // Nothing cached, nothing foretold: two experts in two seconds, the last is computed after that.
  CHECK_NEAR(estimate_layer(layer, link, {0, 0}).exposed_s, 1.0, 1e-12);
  // Two of four whole experts. Where one is missing, the other is computed while it comes; in one
  // token of four both are, and it takes a second more.
  const auto half = estimate_layer(layer, link, {2, 64});
  CHECK_NEAR(half.hit_rate, 0.5, 0);
  CHECK_NEAR(half.missing, 1.0, 1e-12);
  CHECK_NEAR(half.demand_bytes, 6400, 1e-9);
  CHECK_NEAR(half.exposed_s, 0.25, 1e-12);
  LayerModel alternating = layer;  // never one: both or none
  alternating.missing = {0, 0.25, 0.5, 0.75, 1, 0, 0, 0, 0, 0, 1, 0.75, 0.5, 0.25, 0};
  CHECK_NEAR(estimate_layer(alternating, link, {2, 64}).exposed_s, 0.5, 1e-12);
  const TransferCost slow{0, 640};
  // 10 s for each, then a second of computing, of which 2 s are no waiting.
  CHECK_NEAR(estimate_layer(layer, slow, {2, 64}).exposed_s,
             0.5 * (10 + 1 - 2) + 0.25 * (20 + 1 - 2), 1e-12);
  // The second of two is computed last; over a fast link only the first is waited for.
  CHECK_NEAR(estimate_layer(layer, slow, {0, 0}).exposed_s, 20 + 1 - 2, 1e-12);
  CHECK_NEAR(estimate_layer(layer, {0, 64000}, {0, 0}).exposed_s, 0.1, 1e-12);
  // All tops, half an expert each: two halves to come.
  const auto tops = estimate_layer(layer, slow, {4, 32});
  CHECK_NEAR(tops.demand_bytes, 6400, 1e-9);
  CHECK_NEAR(tops.exposed_s, 10 + 0.5 - 2, 1e-12);
  CHECK_NEAR(estimate_layer(layer, slow, {4, 64}).exposed_s, 0.0, 0);
  // A window of 15 s is enough for one expert and a half; the first is right for certain.
  layer.correctness = {1, 0.5};
  layer.window_s = 15;
  const auto ahead = estimate_layer(layer, slow, {0, 0});
  CHECK_NEAR(ahead.num_ready, 1.5, 1e-12);
  CHECK_NEAR(ahead.num_useful, 1.25, 1e-12);
  CHECK_NEAR(ahead.prefetch_bytes, 9600, 1e-9);
  CHECK_NEAR(ahead.missing, 0.75, 1e-12);
  // Demand waits for half of the guess that is under way where it is wrong, one time in four; 3/8
  // of the experts are still missing.
  CHECK_NEAR(ahead.exposed_s, 30.0 / 64 * (11.25 + 1 - 2) + 9.0 / 64 * (21.25 + 1 - 2), 1e-12);
  // If the first guess were always of something cached already, it would be worth nothing.
  layer.absent = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  layer.absent_right.assign(10, 0);
  CHECK_NEAR(estimate_layer(layer, slow, {0, 0}).missing, 2, 1e-12);
  layer.absent.clear();
  layer.absent_right.clear();
  // What is cached leaves the window to the others: only if both are absent, one time in four,
  // there is half a guess that is not ready.
  CHECK_NEAR(estimate_layer(layer, slow, {2, 64}).num_ready, 2 - 0.25 / 2, 1e-12);
}

TEST("set_windows: the experts before, the attention, and the head before the first layer") {
  std::vector<LayerModel> layers(3, simple_layer());
  for (std::size_t l = 0; l < 3; ++l) {
    layers[l].moe_s = static_cast<double>(l + 1);
    layers[l].attention_s = 10 * static_cast<double>(l + 1);
  }
  set_windows(layers, 100);
  CHECK_NEAR(layers[0].window_s, 10 + 100, 0);
  CHECK_NEAR(layers[1].window_s, 20, 0);
  CHECK_NEAR(layers[0].before_s, 3, 0);
  CHECK_NEAR(layers[1].before_s, 1, 0);
}

TEST("estimate_layer: more slots, larger tops, a faster link, better guesses never wait longer") {
  std::mt19937 random(3);
  for (int round = 0; round < 300; ++round) {
    PlanProblem problem = random_problem(random, 1, 1 + random() % 10, 1 + random() % 6);
    LayerModel layer = problem.layers[0];
    const auto wait = [&](std::size_t slots, std::size_t top) {
      return estimate_layer(layer, problem.link, {slots, top}).exposed_s;
    };
    // With prefetch, a token may wait for a wrong guess that is under way.
    const double slack = layer.correctness.empty() ? 0 : 0.25 * problem.link.seconds(layer.move(0));
    for (std::size_t top = 32; top <= layer.records; top += 32) {
      for (std::size_t slots = 1; slots <= layer.num_experts; ++slots) {
        const double here = wait(slots, top);
        CHECK(here >= 0);
        CHECK(here <= wait(slots - 1, top) * (1 + 1e-12) + slack);
        // Where some bottoms and some whole experts come, the first to come is taken for an average
        // one.
        CHECK(here <= wait(slots, top - 32) + 0.02 * layer.moe_s + slack);
        TransferCost faster = problem.link;
        faster.bytes_per_s *= 1.5;
        CHECK(estimate_layer(layer, faster, {slots, top}).exposed_s <= here * (1 + 1e-12) + slack);
        LayerModel better = layer;
        for (double& p : better.correctness) p = std::sqrt(p);
        better.window_s *= 1.5;
        CHECK(estimate_layer(better, problem.link, {slots, top}).exposed_s <=
              here * (1 + 1e-12) + slack);
      }
    }
  }
}

TEST("prompt_seconds: the larger of moving what is not resident once a chunk, and computing") {
  LayerModel layer = simple_layer();
  layer.prompt_s = 0.01;
  const TransferCost link{0, 6400};
  CHECK_NEAR(prompt_seconds(layer, link, {0, 0}, 10, 512), 4, 1e-12);
  CHECK_NEAR(prompt_seconds(layer, link, {0, 0}, 1, 512), 2, 1e-12);  // one token uses two
  CHECK_NEAR(prompt_seconds(layer, link, {0, 0}, 10, 5), 8, 1e-12);
  CHECK_NEAR(prompt_seconds(layer, link, {2, 32}, 10, 512), 3, 1e-12);
  CHECK_NEAR(prompt_seconds(layer, link, {4, 64}, 10, 512), 0.1, 1e-12);
  CHECK_NEAR(prompt_seconds(layer, link, {0, 0}, 1000, 512), 10 * 0.488 + 5.12, 1e-9);
}

TEST("Planner: of one layer, the best of all slots and splits that fit") {
  std::mt19937 random(5);
  for (int round = 0; round < 100; ++round) {
    const Planner planner(random_problem(random, 1, 1 + random() % 10, 1 + random() % 6));
    const LayerModel& layer = planner.problem().layers[0];
    const std::size_t bytes = random_bytes(random, planner);
    double best = planner.estimate({{0, 0}}).seconds;
    for (std::size_t top = 32; top <= layer.records; top += 32) {
      const std::size_t slots = std::min(layer.num_experts, bytes / (top * layer.record_bytes));
      best = std::min(best, planner.estimate({{slots, top}}).seconds);
    }
    const CacheSetting found = planner.best_of_layer(0, bytes);
    CHECK(planner.bytes_of({found}) <= bytes);
    CHECK_NEAR(planner.estimate({found}).seconds, best, 1e-6 * best);
  }
}

// Least time over all plans within so many quanta: layers × quanta × settings of a layer.
double exact_seconds(const Planner& planner, std::size_t bytes) {
  const auto& layers = planner.problem().layers;
  const std::size_t quantum = layers[0].quantum_records * layers[0].record_bytes;
  std::vector<double> best(bytes / quantum + 1, 0);
  for (const LayerModel& layer : layers) {
    std::vector<double> of_layer(best.size(), INFINITY);
    for (std::size_t slots = 0; slots <= layer.num_experts; ++slots) {
      for (std::size_t top = 32; top <= layer.records; top += 32) {
        const std::size_t weight = slots * (top / 32);
        if (weight >= best.size()) break;
        const CacheSetting setting{slots, slots == 0 ? 0 : top};
        of_layer[weight] = std::min(
            of_layer[weight], estimate_layer(layer, planner.problem().link, setting).exposed_s);
      }
    }
    std::vector<double> next(best.size(), INFINITY);
    for (std::size_t q = 0; q < best.size(); ++q) {
      for (std::size_t own = 0; own <= q; ++own) {
        next[q] = std::min(next[q], best[q - own] + of_layer[own]);
      }
    }
    best = next;
  }
  double seconds = planner.problem().head_s + best.back();
  for (const LayerModel& layer : layers) seconds += layer.attention_s + layer.moe_s;
  return seconds;
}

void check_plan(const Planner& planner, std::size_t bytes, double most) {
  const auto plan = planner.divide(bytes);
  CHECK(planner.bytes_of(plan) <= bytes);
  for (std::size_t l = 0; l < plan.size(); ++l) {
    CHECK(plan[l].num_slots <= planner.problem().layers[l].num_experts);
    CHECK(plan[l].top_records % 32 == 0);
    CHECK((plan[l].num_slots == 0) == (plan[l].top_records == 0));
  }
  const double seconds = planner.estimate(plan).seconds;
  CHECK(seconds <= most);
  for (const double split : {0.1, 0.25, 0.4, 0.5, 0.75, 1.0}) {
    const auto uniform = planner.uniform(bytes, split);
    CHECK(planner.bytes_of(uniform) <= bytes);
    CHECK(seconds <= planner.estimate(uniform).seconds);
  }
}

TEST("Planner: within 1 % of the best of all plans, and never slower than a uniform one") {
  std::mt19937 random(19);
  for (int round = 0; round < 60; ++round) {
    const std::size_t layers = 1 + random() % 8;
    const Planner planner(random_problem(random, layers, 1 + random() % 12, 1 + random() % 5));
    const std::size_t bytes = random_bytes(random, planner);
    check_plan(planner, bytes, 1.01 * exact_seconds(planner, bytes));
  }
  // More quanta than units.
  for (int round = 0; round < 6; ++round) {
    const Planner planner(random_problem(random, 12, 32, 8));
    const std::size_t bytes = random_bytes(random, planner);
    check_plan(planner, bytes, 1.01 * exact_seconds(planner, bytes));
  }
  for (int round = 0; round < 4; ++round) {
    const Planner planner(random_problem(random, 64, 64, 8));
    check_plan(planner, random_bytes(random, planner), INFINITY);
  }
}

TEST("Planner: what the units of the division leave over is spent") {
  // More quanta than units, and every record more in memory is worth something.
  PlanProblem problem;
  for (std::size_t l = 0; l < 64; ++l) {
    LayerModel layer = simple_layer();
    layer.num_experts = 64;
    layer.records = 256;
    layer.hit_rate.clear();
    for (int n = 0; n <= 64; ++n) layer.hit_rate.push_back(n / 64.0 * (l % 2 == 0 ? 1 : 0.5));
    problem.layers.push_back(layer);
  }
  problem.link = {0, 100};
  set_windows(problem.layers, 0);
  const Planner planner(problem);
  for (const std::size_t share : {3, 7, 11}) {
    const std::size_t bytes = planner.total_bytes() / share + 12345;
    auto plan = planner.divide(bytes);
    const double seconds = planner.estimate(plan).seconds;
    const std::size_t left = bytes - planner.bytes_of(plan);
    for (std::size_t l = 0; l < plan.size(); ++l) {
      auto other = plan;
      const std::size_t own = plan[l].num_slots * plan[l].top_records * 100;
      other[l] = planner.best_of_layer(l, own + left);
      CHECK(planner.estimate(other).seconds >= seconds * (1 - 1e-9));
    }
  }
}

TEST("Planner: layers of different sizes and odd ends of experts") {
  std::mt19937 random(23);
  PlanProblem problem = random_problem(random, 3, 6, 2);
  problem.layers[1].records = 50;  // a quantum and a bit
  problem.layers[2].record_bytes = 1000;
  const Planner planner(problem);
  for (const double share : {0.0, 0.1, 0.5, 0.9, 1.0, 2.0}) {
    const auto bytes = static_cast<std::size_t>(share * static_cast<double>(planner.total_bytes()));
    const auto plan = planner.divide(bytes);
    CHECK(planner.bytes_of(plan) <= bytes);
    CHECK(plan[1].top_records == 0 || plan[1].top_records == 32 || plan[1].top_records == 50);
  }
  CHECK(planner.divide(planner.total_bytes()) ==
        planner.uniform(planner.total_bytes(), 1));  // all there is
}

TEST("Planner: a split that is given is kept") {
  std::mt19937 random(29);
  const PlanProblem problem = random_problem(random, 5, 8, 4);
  const Planner planner(problem, 0.5);
  for (const CacheSetting& setting : planner.divide(planner.total_bytes() / 3)) {
    CHECK(setting.num_slots == 0 || setting.top_records == 64);
  }
  const Planner none(problem, 0);
  CHECK_EQ(none.bytes_of(none.divide(none.total_bytes())), 0U);
}

TEST("Planner: of plans that take as long, the one that moves less") {
  PlanProblem problem;
  problem.layers.assign(2, simple_layer());
  problem.link = {0, 6400e6};  // so fast that all of it is hidden
  set_windows(problem.layers, 0);
  const Planner planner(problem);
  const auto plan = planner.divide(4 * 6400);
  CHECK_NEAR(planner.estimate(plan).exposed_s, 0, 1e-6);
  CHECK_EQ(planner.bytes_of(plan), 4U * 6400U);
}

TEST("Planner: problems that contradict themselves are refused") {
  std::mt19937 random(31);
  const PlanProblem good = random_problem(random, 2, 4, 2);
  const auto refused = [&](const std::function<void(PlanProblem&)>& spoil, const char* text) {
    PlanProblem problem = good;
    spoil(problem);
    CHECK_THROWS(InvalidArgument, Planner(problem), text);
  };
  refused([](auto& p) { p.layers.clear(); }, "layers");
  refused([](auto& p) { p.layers[1].hit_rate.pop_back(); }, "hit_rate");
  refused([](auto& p) { p.layers[1].hit_rate = {0, 1, 0.5, 1, 1}; }, "more slots");
  refused([](auto& p) { p.layers[1].hit_rate[1] = std::nan(""); }, "hit_rate[1]");
  refused([](auto& p) { p.layers[0].top_k = 5; }, "top_k 5");
  refused([](auto& p) { p.layers[0].records = 0; }, "sizes");
  refused([](auto& p) { p.layers[0].records = std::size_t{1} << 60; }, "bytes");
  refused([](auto& p) { p.layers[0].moe_s = -1; }, "moe");
  refused([](auto& p) { p.layers[0].attention_s = INFINITY; }, "attention");
  refused([](auto& p) { p.layers[0].correctness = {1.5}; }, "correctness[0]");
  refused([](auto& p) { p.layers[0].correctness.assign(9, 0.5); }, "correctness");
  refused([](auto& p) { p.layers[0].missing.assign(3, 0.5); }, "missing");
  refused([](auto& p) { p.layers[0].missing.assign((p.layers[0].top_k + 1) * 5, 0.9); }, "add up");
  refused([](auto& p) { p.layers[0].moves.resize(1); }, "moves");
  refused([](auto& p) { p.layers[0].moves.assign(3, {1, -1}); }, "moves");
  refused([](auto& p) { p.link.bytes_per_s = 0; }, "rate");
  refused([](auto& p) { p.head_s = std::nan(""); }, "head");
  CHECK_THROWS(InvalidArgument, Planner(good, 1.5), "split");
  CHECK_THROWS(InvalidArgument, Planner(good).uniform(1000, std::nan("")), "split");
  CHECK_THROWS(InvalidArgument, Planner(good).estimate({}), "settings");
  CHECK_THROWS(InvalidArgument, Planner(good).estimate({{9, 32}, {0, 0}}), "settings[0]");
}

}  // namespace
}  // namespace moerun::test
