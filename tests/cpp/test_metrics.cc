// SRP and hit rates against loops that follow the definitions word by word.
#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "metrics/layer_prediction.h"
#include "metrics/srp.h"
#include "metrics/stack_replay.h"
#include "metrics/trace_metrics.h"
#include "metrics/trace_view.h"
#include "metrics/window_balance.h"

namespace moerun::test {
namespace {

struct Routing {
  std::vector<std::uint16_t> ids;
  std::size_t slots;
  std::size_t experts;
  RoutingView view() const { return {ids, slots, experts}; }
};

// Neighbouring tokens share experts, as in real models.
Routing random_routing(std::mt19937& random) {
  Routing routing;
  routing.experts = 1 + random() % 9;
  routing.slots = 1 + random() % routing.experts;
  const std::size_t tokens = random() % 60;
  std::vector<std::uint16_t> order(routing.experts);
  for (std::size_t e = 0; e < routing.experts; ++e) order[e] = static_cast<std::uint16_t>(e);
  for (std::size_t t = 0; t < tokens; ++t) {
    if (random() % 3 == 0) std::shuffle(order.begin(), order.end(), random);
    std::swap(order[random() % order.size()], order[random() % order.size()]);
    routing.ids.insert(routing.ids.end(), order.begin(),
                       order.begin() + static_cast<std::ptrdiff_t>(routing.slots));
  }
  return routing;
}

bool uses(const RoutingView& routing, std::size_t token, std::size_t expert) {
  const auto experts = routing.token(token);
  return std::find(experts.begin(), experts.end(), expert) != experts.end();
}

// One cache of one capacity.
std::uint64_t brute_force_hits(const RoutingView& routing, ReplayPolicy policy, std::size_t m,
                               std::size_t capacity) {
  std::vector<std::size_t> cache;
  std::vector<long> last(routing.num_experts, -1);
  std::vector<long> count(routing.num_experts, 0);
  std::uint64_t hits = 0;
  long serial = 0;
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    const std::vector<std::size_t> before = cache;
    std::set<std::size_t> served;
    const auto experts = routing.token(t);
    for (std::size_t slot = 0; slot < experts.size(); ++slot) {
      const std::size_t expert = experts[slot];
      const auto holds = [expert](const auto& all) {
        return std::find(all.begin(), all.end(), expert) != all.end();
      };
      if (holds(before)) ++hits;
      if (!holds(cache) && cache.size() < capacity) {
        cache.push_back(expert);
        if (!holds(before)) ++hits;
      } else if (!holds(cache)) {
        const auto key = [&](std::size_t x) -> std::vector<long> {
          if (policy == ReplayPolicy::lru) return {last[x]};
          if (policy == ReplayPolicy::lfu) return {count[x], last[x]};
          long to_come = 0;
          long next = 1'000'000;
          for (std::size_t u = routing.num_tokens(); u-- > t;) {
            if (u == t && served.contains(x)) continue;
            if (!uses(routing, u, x)) continue;
            if (u < t + m) ++to_come;
            const auto row = routing.token(u);
            next = static_cast<long>(u * routing.slots) +
                   (std::find(row.begin(), row.end(), x) - row.begin());
          }
          if (policy == ReplayPolicy::sch) return {to_come, last[x]};
          return {-next, -static_cast<long>(x)};
        };
        *std::min_element(cache.begin(), cache.end(),
                          [&](std::size_t a, std::size_t b) { return key(a) < key(b); }) = expert;
      }
      served.insert(expert);
      last[expert] = ++serial;
      ++count[expert];
    }
  }
  return hits;
}

}  // namespace

TEST("hits of every capacity are those of a cache of that capacity, for every policy") {
  std::mt19937 random(5);
  for (int round = 0; round < 150; ++round) {
    const Routing routing = random_routing(random);
    const std::size_t m = 1 + random() % 20;
    for (const auto policy :
         {ReplayPolicy::sch, ReplayPolicy::lru, ReplayPolicy::lfu, ReplayPolicy::belady}) {
      const auto hits = hits_by_capacity(routing.view(), policy, m);
      CHECK_EQ(hits.size(), routing.experts + 1);
      CHECK_EQ(hits[0], std::uint64_t{0});
      for (std::size_t c = 1; c <= routing.experts; ++c) {
        CHECK_EQ(hits[c], brute_force_hits(routing.view(), policy, m, c));
      }
      CHECK_EQ(hits.back(), routing.ids.size());
    }
  }
}

TEST("window counts and SRP are what a loop over windows gives") {
  std::mt19937 random(6);
  for (int round = 0; round < 100; ++round) {
    const Routing routing = random_routing(random);
    const RoutingView view = routing.view();
    const std::size_t m = 1 + random() % 12;
    std::vector<std::uint64_t> counts(routing.experts * (m + 1), 0);
    std::vector<std::uint64_t> of_layer(m + 1, 0);
    count_activations(view, m, CountBy::expert, counts);
    count_activations(view, m, CountBy::layer, of_layer);
    std::vector<std::uint64_t> group(m + 1, 0);
    std::vector<std::size_t> all;
    for (std::size_t e = 0; e < routing.experts; ++e) {
      std::vector<std::uint64_t> expected(m + 1, 0);
      for (std::size_t first = 0; first + m <= view.num_tokens(); ++first) {
        std::size_t f = 0;
        for (std::size_t t = first; t < first + m; ++t) f += uses(view, t, e);
        ++expected[f];
        ++group[f];
        all.push_back(f);
      }
      const auto found = std::span(counts).subspan(e * (m + 1), m + 1);
      CHECK(std::equal(found.begin(), found.end(), expected.begin(), expected.end()));
    }
    CHECK(of_layer == group);
    Srp expected;
    double active = 0;
    for (const std::size_t f : all) active += static_cast<double>(f);
    for (std::size_t a = 0; a <= m && active > 0; ++a) {
      double covered = 0;
      double chosen = 0;
      for (const std::size_t f : all) {
        if (f < a) continue;
        covered += static_cast<double>(f);
        chosen += 1;
      }
      const double f1 = 2 * covered / (static_cast<double>(m) * chosen + active);
      if (f1 > expected.srp) expected = {f1, a, static_cast<double>(m) * chosen / active, 0};
    }
    const Srp found = srp_of(group);
    CHECK(std::abs(found.srp - expected.srp) < 1e-12);
    CHECK_EQ(found.threshold, expected.threshold);
    CHECK(std::abs(found.cache_ratio - expected.cache_ratio) < 1e-12);
  }
}

TEST("deviations, previous tokens and layers are what plain loops give") {
  std::mt19937 random(8);
  for (int round = 0; round < 100; ++round) {
    const Routing routing = random_routing(random);
    const RoutingView view = routing.view();
    const std::size_t m = 1 + random() % 12;
    double sum = 0;
    for (std::size_t first = 0; first + m <= view.num_tokens(); ++first) {
      double mean = 0;
      double square = 0;
      for (std::size_t e = 0; e < routing.experts; ++e) {
        double rate = 0;
        for (std::size_t t = first; t < first + m; ++t) rate += uses(view, t, e);
        rate /= static_cast<double>(m);
        mean += rate / static_cast<double>(routing.experts);
        square += rate * rate / static_cast<double>(routing.experts);
      }
      sum += std::sqrt(std::max(0.0, square - mean * mean));
    }
    CHECK(std::abs(sum_of_deviations(view, m) - sum) < 1e-6);

    std::uint64_t repeated = 0;
    for (std::size_t t = 1; t < view.num_tokens(); ++t) {
      for (const std::size_t e : view.token(t)) repeated += uses(view, t - 1, e);
    }
    CHECK_EQ(hits_of_previous_token(view), repeated);
  }
}

TEST("a layer that follows from the one before is predicted from it, an other is not") {
  const std::vector<std::uint16_t> first = {0, 1, 1, 2, 2, 3, 3, 0};
  std::vector<std::uint16_t> second;
  for (const std::uint16_t id : first) second.push_back(static_cast<std::uint16_t>((id + 2) % 4));
  const RoutingView a{first, 2, 4};
  const RoutingView b{second, 2, 4};
  std::vector<std::uint64_t> pairs(16, 0);
  count_pairs(a, b, pairs);
  CHECK_EQ(pairs[0 * 4 + 2], std::uint64_t{2});
  CHECK_EQ(pairs[0 * 4 + 0], std::uint64_t{0});
  const std::vector<float> weights(pairs.begin(), pairs.end());
  CHECK_EQ(hits_of_previous_layer(a, b, weights), std::uint64_t{8});
  // No score at all: the lower ids are named.
  CHECK_EQ(hits_of_previous_layer(a, b, std::vector<float>(16, 0)), std::uint64_t{4});
  CHECK_THROWS(InvalidArgument, count_pairs(a, {second, 4, 4}, pairs), "different sizes");
}

namespace {

struct Trace {
  std::vector<std::uint8_t> ids;
  std::vector<std::int32_t> lengths;
  TraceView view() const { return {std::span(ids), lengths, 2, 3, 2, 4}; }
};

// Two sequences, two layers, up to three tokens, two of four experts.
Trace small_trace() {
  return {{0, 1, 1, 2, 2, 3, /**/ 3, 2, 2, 1, 1, 0, /**/ 0, 1, 0, 2, 9, 9, /**/ 1, 2, 1, 3, 9, 9},
          {3, 2}};
}

}  // namespace

TEST("a trace gives its sequences layer by layer and as one pool, without their padding") {
  const Trace trace = small_trace();
  check_trace(trace.view());
  std::vector<std::uint16_t> memory;
  const RoutingView layer = trace.view().of_layer(1, 1, memory);
  CHECK_EQ(layer.num_tokens(), std::size_t{2});
  CHECK((memory == std::vector<std::uint16_t>{1, 2, 1, 3}));
  const RoutingView pool = trace.view().of_pool(1, memory);
  CHECK_EQ(pool.slots, std::size_t{4});
  CHECK_EQ(pool.num_experts, std::size_t{8});
  CHECK((memory == std::vector<std::uint16_t>{0, 1, 5, 6, 0, 2, 5, 7}));
}

TEST("metrics of a trace are those of its sequences, on any number of threads") {
  const Trace trace = small_trace();
  std::vector<std::uint16_t> memory;
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    const auto hits = replay_hits(trace.view(), ReplayPolicy::lru, 1, false, pool);
    const auto pooled = replay_hits(trace.view(), ReplayPolicy::sch, 2, true, pool);
    const auto layers = layer_histograms(trace.view(), 2, pool);
    const auto experts = expert_histograms(trace.view(), 2, pool);
    CHECK_EQ(hits.size(), std::size_t{2 * 2 * 5});
    CHECK_EQ(pooled.size(), std::size_t{2 * 9});
    for (std::size_t item = 0; item < 4; ++item) {
      const auto one =
          hits_by_capacity(trace.view().of_layer(item / 2, item % 2, memory), ReplayPolicy::lru, 1);
      CHECK(std::equal(one.begin(), one.end(), hits.begin() + static_cast<long>(item * 5)));
    }
    std::uint64_t windows = 0;
    for (const std::uint64_t count : layers) windows += count;
    CHECK_EQ(windows, std::uint64_t{(2 + 1) * 2 * 4});
    std::uint64_t by_expert = 0;
    for (const std::uint64_t count : experts) by_expert += count;
    CHECK_EQ(by_expert, windows);
    const auto apart = expert_histograms_by_sequence(trace.view(), 1, 2, pool);
    for (std::size_t i = 0; i < 12; ++i) CHECK_EQ(apart[i] + apart[12 + i], experts[12 + i]);
    CHECK_EQ(num_activations(trace.view(), pool)[0], std::uint64_t{1});
    CHECK_EQ(previous_token_hits(trace.view(), pool)[3], std::uint64_t{1});
    CHECK_EQ(layer_pairs(trace.view(), pool).size(), std::size_t{16});
    CHECK_EQ(window_deviations(trace.view(), 3, pool)[2], 0.0);
  }
}

TEST("a trace that cannot be is refused with the place") {
  Trace trace = small_trace();
  trace.ids[7] = 4;
  CHECK_THROWS(InvalidArgument, check_trace(trace.view()), "expert_ids[0, 1, 0, 1]", "0 to 3", "4");
  trace = small_trace();
  trace.ids[15] = 0;
  CHECK_THROWS(InvalidArgument, check_trace(trace.view()), "expert_ids[1, 0, 1, 1]", "twice");
  trace = small_trace();
  trace.lengths[1] = 4;
  CHECK_THROWS(InvalidArgument, check_trace(trace.view()), "lengths[1]", "4");
  trace.lengths[1] = 3;
  CHECK_THROWS(InvalidArgument, check_trace(trace.view()), "expert_ids[1, 0, 2, 0]", "9");
  trace.ids.pop_back();
  CHECK_THROWS(InvalidArgument, check_trace(trace.view()), "expected 24 ids, found 23");
}

TEST("a pool of more experts than fit in 16 bits is refused, their layers are not") {
  const std::vector<std::uint16_t> ids(70, 1023);
  const std::vector<std::int32_t> lengths = {1};
  const TraceView trace{std::span(ids), lengths, 70, 1, 1, 1024};
  check_trace(trace);
  ThreadPool pool(1);
  CHECK_EQ(replay_hits(trace, ReplayPolicy::lru, 1, false, pool).size(), std::size_t{70 * 1025});
  CHECK_THROWS(InvalidArgument, replay_hits(trace, ReplayPolicy::lru, 1, true, pool), "65535",
               "70 layers");
}

TEST("metrics refuse segments of no tokens and policies that are not there") {
  const std::vector<std::uint16_t> ids = {0, 1};
  std::vector<std::uint64_t> counts(3, 0);
  CHECK_THROWS(InvalidArgument, hits_by_capacity({ids, 2, 4}, ReplayPolicy::sch, 0), "segment");
  CHECK_THROWS(InvalidArgument, count_activations({ids, 2, 4}, 0, CountBy::layer, counts),
               "at least 1");
  CHECK_THROWS(InvalidArgument, count_activations({ids, 2, 4}, 2, CountBy::expert, counts), "4 x");
  CHECK_THROWS(InvalidArgument, sum_of_deviations({ids, 2, 4}, 0), "segment");
  CHECK_THROWS(InvalidArgument, parse_replay_policy("mru"), "lru", "mru");
}

}  // namespace moerun::test
