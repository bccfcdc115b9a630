// What the last tokens asked for, and that no live cache does better than the bound over them.
#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "expert/routing_window.h"
#include "expert/window_hits.h"
#include "pattern_cache.h"
#include "replay/policy_replay.h"
#include "trace/routing_record.h"

namespace moerun::test {
namespace {

using Id = std::uint16_t;

// Everything that a cache may do with the rest of the tokens.
std::uint64_t brute_force_optimal(const RoutingHistory::Layer& layer, std::size_t top_k,
                                  std::size_t slots, std::size_t token, std::set<Id> held) {
  const std::size_t num_tokens = layer.expert_ids.size() / top_k;
  if (token == num_tokens) return 0;
  // Experts may be let go at any time, so that holding too many for a moment is a choice to come.
  const auto best_of = [&](const std::set<Id>& has, const auto& go_on) {
    const std::vector<Id> all(has.begin(), has.end());
    std::uint64_t best = 0;
    for (unsigned bits = 0; bits < 1u << all.size(); ++bits) {
      std::set<Id> chosen;
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (bits >> i & 1) chosen.insert(all[i]);
      }
      const bool is_full = chosen.size() == std::min(slots, all.size());
      if (is_full) best = std::max<std::uint64_t>(best, go_on(chosen));
    }
    return best;
  };
  for (const auto& offer : layer.offers) {
    if (offer.token == token) held.insert(offer.expert);
  }
  return best_of(held, [&](const std::set<Id>& before) {
    std::uint64_t hits = 0;
    std::set<Id> after = before;
    for (std::size_t i = token * top_k; i < (token + 1) * top_k; ++i) {
      hits += before.contains(layer.expert_ids[i]);
      after.insert(layer.expert_ids[i]);
    }
    return hits + best_of(after, [&](const std::set<Id>& kept) {
             return brute_force_optimal(layer, top_k, slots, token + 1, kept);
           });
  });
}

RoutingHistory random_history(std::mt19937& random, std::size_t experts, std::size_t top_k,
                              std::size_t tokens) {
  RoutingHistory history;
  history.num_tokens = tokens;
  history.top_k = top_k;
  history.layers.resize(1);
  std::vector<Id> order(experts);
  for (std::size_t e = 0; e < experts; ++e) order[e] = static_cast<Id>(e);
  for (std::size_t t = 0; t < tokens; ++t) {
    if (random() % 3 == 0) std::shuffle(order.begin(), order.end(), random);
    std::swap(order[0], order[random() % experts]);
    auto& ids = history.layers[0].expert_ids;
    ids.insert(ids.end(), order.begin(), order.begin() + static_cast<std::ptrdiff_t>(top_k));
  }
  return history;
}

}  // namespace

TEST("routing_window: the bound is what trying everything gives, with first content and offers") {
  std::mt19937 random(2);
  for (int round = 0; round < 60; ++round) {
    RoutingHistory history = random_history(random, 5, 2, 5);
    for (Id expert = 0; expert < 5; ++expert) {
      if (random() % 4 == 0) history.layers[0].start.push_back(expert);
    }
    for (std::uint32_t token = 0; token < 5; ++token) {
      if (random() % 3 == 0) {
        history.layers[0].offers.push_back({token, static_cast<Id>(random() % 5)});
      }
    }
    for (const std::size_t slots : {0ul, 1ul, 2ul, 3ul}) {
      const auto& layer = history.layers[0];
      const std::set<Id> start(layer.start.begin(), layer.start.end());
      const auto hits = window_hits(history, std::vector{slots}).layers[0];
      CHECK_EQ(hits.optimal, brute_force_optimal(layer, 2, slots, 0, start));
      CHECK_EQ(hits.lookups, std::uint64_t{10});
    }
  }
}

TEST("routing_window: from an empty cache the bound is that of the replay, at any length") {
  std::mt19937 random(4);
  for (const std::size_t experts : {3ul, 17ul, 64ul}) {
    const RoutingHistory history = random_history(random, experts, 3, 700);
    const auto expected = most_hits({history.layers[0].expert_ids, 3, experts});
    std::vector<std::uint64_t> uses(experts, 0);
    for (const Id expert : history.layers[0].expert_ids) ++uses[expert];
    std::sort(uses.rbegin(), uses.rend());
    std::uint64_t most_used = 0;
    for (std::size_t slots = 0; slots <= experts; ++slots) {
      const auto hits = window_hits(history, std::vector{slots}).layers[0];
      CHECK_EQ(hits.optimal, expected[slots]);
      CHECK_EQ(hits.best_static, most_used);
      if (slots < experts) most_used += uses[slots];
    }
  }
}

TEST("routing_window: no live cache beats the bound, whatever prompts, warmth and stops do to it") {
  std::mt19937 random(6);
  std::size_t num_compared = 0;
  for (int round = 0; round < 60; ++round) {
    const std::string policy = std::vector<std::string>{"lru", "lfu", "lcp"}[random() % 3];
    const auto layers = [&] {
      return plan_text({{random() % 8, random() % 2 == 0 ? 0.4 : 1}, {random() % 8, 1}}, policy);
    };
    PatternCache pattern(layers());
    ExpertCache& cache = pattern.cache();
    for (int step = 0; step < 60; ++step) {
      switch (random() % 12) {
        case 0:
          pattern.use(1 + random() % 2, random_token(random)[0], AccessMode::prefill);
          break;
        case 1:
          cache.warm(1 + random() % 2, random_token(random)[0]);
          break;
        case 2: {  // a token that does not come to its end
          cache.begin_step(1);
          const auto experts = random_token(random)[0];
          if (random() % 2 == 0) pattern.use(1, experts, AccessMode::decode);
          if (random() % 2 == 0) cache.acquire(2, experts, AccessMode::decode);
          break;
        }
        case 3:
          if (random() % 4 != 0) break;
          try {
            cache.reconfigure(pattern.layout(layers()));
            CHECK_EQ(cache.window_hits().num_tokens, std::size_t{0});
          } catch (const OutOfMemory&) {
          }
          break;
        default:
          pattern.decode(random_token(random));
      }
      const WindowHits hits = cache.window_hits();
      for (const auto& layer : hits.layers) {
        CHECK(layer.live <= layer.optimal && layer.optimal <= layer.lookups);
        CHECK(layer.best_static <= layer.lookups);
        CHECK_EQ(layer.lookups, hits.num_tokens * 3);
        num_compared += layer.live != 0;
      }
    }
  }
  CHECK(num_compared > 1000);
}

TEST("routing_window: hits and ids are those of the live cache, and of no more tokens than fit") {
  RoutingWindow window(2, 2);
  CHECK_EQ(window.block_tokens(), RoutingWindow::kMaxBlockTokens);
  CHECK_EQ(RoutingWindow(94, 8).block_tokens(), std::size_t{(8u << 20) / (4 * 94 * 8)});
  std::vector<Id> start = {7};
  const auto residents = [&](std::size_t) { return start; };
  const auto token = [&](std::size_t expert, std::size_t hits) {
    window.begin_token(residents);
    const std::vector<std::size_t> experts = {expert, expert + 1};
    for (const std::size_t layer : {0ul, 1ul}) window.record(layer, experts, hits);
    window.finish_token();
  };
  const std::size_t size = window.block_tokens();
  for (std::size_t t = 0; t < 2 * size; ++t) token(t % 50, 1);
  start = {9, 8};
  CHECK_EQ(window.copy().num_tokens, 2 * size);
  CHECK_EQ(window.copy().layers[0].hits, std::uint64_t{2 * size});
  window.offer(1, 33);
  token(3, 2);
  token(4, 0);
  const RoutingHistory history = window.copy();
  CHECK_EQ(history.num_tokens, size + 2);
  CHECK_EQ(history.layers[1].hits, std::uint64_t{size + 2});
  CHECK_EQ(history.layers[1].expert_ids.size(), 2 * (size + 2));
  CHECK_EQ(history.layers[1].expert_ids[2 * size + 3], Id{5});
  CHECK(history.layers[1].start == std::vector<Id>{7});
  CHECK_EQ(history.layers[1].offers.size(), std::size_t{1});
  CHECK_EQ(history.layers[1].offers[0].token, static_cast<std::uint32_t>(size));
  window.restart();
  CHECK_EQ(window.copy().num_tokens, std::size_t{0});
}

TEST("routing_window: guesses are judged by rank, only where there were any") {
  PatternCache pattern(plan_text({{3, 1}, {3, 1}}));
  ExpertCache& cache = pattern.cache();
  const auto token = [&](const std::vector<std::size_t>& guess) {
    cache.begin_step(1);
    pattern.use(1, {0, 1, 2}, AccessMode::decode);
    if (!guess.empty()) cache.prefetch(2, guess);
    pattern.use(2, {3, 4, 5}, AccessMode::decode);
    cache.finish_step(0.001);
  };
  token({});
  token({3, 9, 5});
  token({7, 4});
  const RoutingHistory history = cache.routing_history();
  using Counts = std::vector<std::uint64_t>;
  CHECK(history.layers[0].named == Counts({0, 0, 0}));
  CHECK(history.layers[1].named == Counts({2, 2, 1}));
  CHECK(history.layers[1].right == Counts({1, 1, 1}));
  CHECK(history.layers[1].expert_ids == std::vector<Id>({3, 4, 5, 3, 4, 5, 3, 4, 5}));
}

}  // namespace moerun::test
