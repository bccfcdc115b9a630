// SRP and hit rates against loops that follow the definitions word by word.
#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "metrics/srp.h"
#include "metrics/stack_replay.h"

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
    ActivationCounts counts(routing.experts, m);
    counts.add(view);
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
      const auto found = counts.of_expert(e);
      CHECK(std::equal(found.begin(), found.end(), expected.begin(), expected.end()));
    }
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

TEST("counts of two sequences are the sum of their counts") {
  std::mt19937 random(7);
  const Routing one = random_routing(random);
  ActivationCounts both(one.experts, 4);
  both.add(one.view());
  both.add(one.view());
  ActivationCounts single(one.experts, 4);
  single.add(one.view());
  ActivationCounts sum = single;
  sum.add(single);
  for (std::size_t e = 0; e < one.experts; ++e) {
    CHECK(std::equal(both.of_expert(e).begin(), both.of_expert(e).end(), sum.of_expert(e).begin()));
  }
}

TEST("routing that cannot be is refused with token and slot") {
  const std::vector<std::uint16_t> high = {0, 1, 2, 9};
  CHECK_THROWS(InvalidArgument, hits_by_capacity({high, 2, 4}, ReplayPolicy::lru, 1), "token 1",
               "slot 1", "9");
  const std::vector<std::uint16_t> twice = {0, 1, 3, 3};
  CHECK_THROWS(InvalidArgument, ActivationCounts(4, 1).add({twice, 2, 4}), "token 1", "twice");
  CHECK_THROWS(InvalidArgument, hits_by_capacity({twice, 2, 4}, ReplayPolicy::sch, 0), "segment");
  CHECK_THROWS(InvalidArgument, ActivationCounts(0, 1), "at least 1");
  CHECK_THROWS(InvalidArgument, parse_replay_policy("mru"), "lru", "mru");
}

}  // namespace moerun::test
