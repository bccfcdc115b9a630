// One replay for all numbers of slots against one cache each, filled as the live cache fills its.
#include "replay/policy_replay.h"

#include <algorithm>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "check.h"
#include "metrics/stack_replay.h"
#include "replay/slot_statistics.h"
#include "trace/routing_record.h"

namespace moerun::test {
namespace {

using Token = std::vector<std::uint16_t>;

// Neighbouring tokens share experts, as in real models.
std::vector<Token> random_tokens(std::mt19937& random, std::size_t experts, std::size_t k,
                                 std::size_t count) {
  Token order(experts);
  for (std::size_t e = 0; e < experts; ++e) order[e] = static_cast<std::uint16_t>(e);
  std::vector<Token> tokens;
  for (std::size_t t = 0; t < count; ++t) {
    if (random() % 4 == 0) std::shuffle(order.begin(), order.end(), random);
    std::swap(order[random() % experts], order[random() % experts]);
    tokens.emplace_back(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k));
  }
  return tokens;
}

// ExpertCache's rules, in its words: one layer with so many slots.
class PlainCache {
 public:
  PlainCache(std::unique_ptr<CachePolicy> policy, std::size_t slots)
      : policy_(std::move(policy)), slots_(slots) {}

  void fill(const Token& experts) {
    auto next = experts.begin();
    for (auto& slot : slots_) {
      if (slot) continue;
      while (next != experts.end() && (holds(*next) || !policy_->admits(*next))) ++next;
      if (next == experts.end()) return;
      slot = *next++;
    }
  }

  std::uint64_t decode(const Token& experts) {
    std::set<std::size_t> leased;
    for (const std::size_t expert : experts) {
      if (holds(expert)) leased.insert(expert);
    }
    const std::uint64_t hits = leased.size();
    policy_->begin_token();
    for (const std::size_t expert : experts) {
      const bool was_there = leased.contains(expert);
      policy_->access(expert);
      if (was_there || !policy_->admits(expert)) continue;
      std::optional<std::size_t>* slot = nullptr;
      std::vector<std::size_t> candidates;
      for (auto& each : slots_) {
        if (!each && slot == nullptr) slot = &each;
        if (each && !leased.contains(*each)) candidates.push_back(*each);
      }
      if (slot == nullptr && candidates.empty()) continue;
      if (slot == nullptr) {
        const std::size_t victim = policy_->victim(candidates);
        slot = &*std::find(slots_.begin(), slots_.end(), std::optional(victim));
      }
      *slot = expert;
      leased.insert(expert);
    }
    return hits;
  }

  std::set<std::size_t> residents() const {
    std::set<std::size_t> found;
    for (const auto& slot : slots_) {
      if (slot) found.insert(*slot);
    }
    return found;
  }

 private:
  bool holds(std::size_t expert) const {
    return std::find(slots_.begin(), slots_.end(), std::optional(expert)) != slots_.end();
  }

  std::unique_ptr<CachePolicy> policy_;
  std::vector<std::optional<std::size_t>> slots_;
};

struct Case {
  std::string policy;
  PolicyParams params;
};

TEST("policy_replay: all numbers of slots at once hold what one cache each holds, token by token") {
  std::mt19937 random(7);
  for (int round = 0; round < 160; ++round) {
    const std::size_t experts = 1 + random() % 12;
    const std::size_t k = 1 + random() % experts;
    std::vector<Case> cases(4);
    cases[0].policy = "lru";
    cases[1].policy = "lfu";
    cases[2].policy = "lcp";
    cases[2].params.omega = round % 2 == 0 ? 128 : 3;
    cases[3].policy = "static";
    for (std::size_t e = 0; e < experts; ++e) {
      if (random() % 2 == 0) cases[3].params.static_experts.push_back(e);
    }
    for (const Case& each : cases) {
      const auto make = [&] { return make_cache_policy(each.policy, experts, each.params); };
      PolicyReplay replay(make(), experts);
      std::vector<PlainCache> caches;
      for (std::size_t n = 0; n <= experts; ++n) caches.emplace_back(make(), n);
      std::vector<std::uint64_t> hits(experts + 1, 0);
      std::uint64_t lookups = 0;
      for (const Token& token : random_tokens(random, experts, k, 40)) {
        const bool is_prompt = random() % 8 == 0;
        if (is_prompt) {
          replay.fill(token);
        } else {
          replay.decode(token);
          lookups += token.size();
        }
        for (std::size_t n = 0; n <= experts; ++n) {
          if (is_prompt) {
            caches[n].fill(token);
          } else {
            hits[n] += caches[n].decode(token);
          }
          const auto all = replay.residents();
          const auto first = all.first(std::min(n, all.size()));
          CHECK(std::set<std::size_t>(first.begin(), first.end()) == caches[n].residents());
        }
      }
      CHECK(replay.hits() == hits);
      CHECK_EQ(replay.num_lookups(), lookups);
    }
  }
}

// The most hits from here on, over everything that a cache may do.
std::uint64_t brute_force_most(
    const std::vector<Token>& tokens, std::size_t t, const std::set<std::uint16_t>& held,
    std::size_t slots,
    std::map<std::pair<std::size_t, std::set<std::uint16_t>>, std::uint64_t>& known) {
  if (t == tokens.size()) return 0;
  const auto found = known.find({t, held});
  if (found != known.end()) return found->second;
  std::vector<std::uint16_t> all(held.begin(), held.end());
  std::uint64_t hits = 0;
  for (const std::uint16_t expert : tokens[t]) {
    if (held.contains(expert)) {
      ++hits;
    } else {
      all.push_back(expert);
    }
  }
  std::uint64_t best = 0;
  for (std::uint32_t subset = 0; subset < (1U << all.size()); ++subset) {
    std::set<std::uint16_t> kept;
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (((subset >> i) & 1U) != 0) kept.insert(all[i]);
    }
    if (kept.size() > slots) continue;
    best = std::max(best, brute_force_most(tokens, t + 1, kept, slots, known));
  }
  known[{t, held}] = hits + best;
  return hits + best;
}

struct Flat {
  std::vector<std::uint16_t> ids;
  RoutingView view;
  Flat(const std::vector<Token>& tokens, std::size_t experts) {
    for (const Token& token : tokens) ids.insert(ids.end(), token.begin(), token.end());
    view = {ids, tokens.front().size(), experts};
  }
};

TEST("most_hits: is what the best of all choices gives") {
  std::mt19937 random(11);
  for (int round = 0; round < 60; ++round) {
    const std::size_t experts = 2 + random() % 4;
    const std::size_t k = 1 + random() % 2;
    const auto tokens = random_tokens(random, experts, k, 7);
    const Flat routing(tokens, experts);
    const auto most = most_hits(routing.view);
    for (std::size_t n = 0; n <= experts; ++n) {
      std::map<std::pair<std::size_t, std::set<std::uint16_t>>, std::uint64_t> known;
      CHECK_EQ(most[n], brute_force_most(tokens, 0, {}, n, known));
    }
  }
}

TEST("most_hits: no policy and no Belady without a choice to leave experts out has more") {
  std::mt19937 random(13);
  for (int round = 0; round < 40; ++round) {
    const std::size_t experts = 2 + random() % 20;
    const std::size_t k = 1 + random() % experts;
    const auto tokens = random_tokens(random, experts, k, 80);
    const Flat routing(tokens, experts);
    const auto most = most_hits(routing.view);
    std::set<std::uint16_t> used(routing.ids.begin(), routing.ids.end());
    const auto belady = hits_by_capacity(routing.view, ReplayPolicy::belady, 1);
    for (const char* policy : {"lru", "lfu", "lcp"}) {
      PolicyReplay replay(make_cache_policy(policy, experts), experts);
      replay.decode(routing.view);
      const auto hits = replay.hits();
      for (std::size_t n = 0; n <= experts; ++n) CHECK(hits[n] <= most[n]);
      CHECK_EQ(hits[0], 0U);
      CHECK_EQ(hits[experts], routing.ids.size() - used.size());
    }
    for (std::size_t n = 0; n <= experts; ++n) {
      // The metrics count a first touch as a hit while there are empty slots.
      CHECK(belady[n] - std::min(n, used.size()) <= most[n]);
    }
  }
}

TEST("slot_hits: sequences follow one another, or each starts with nothing") {
  std::mt19937 random(17);
  const std::size_t experts = 9;
  const std::size_t k = 3;
  const std::vector<std::int32_t> lengths = {12, 0, 20, 7};
  const std::size_t longest = 20;
  const std::size_t layers = 3;
  std::vector<std::vector<std::vector<Token>>> routing;  // [sequence][layer]
  std::vector<std::uint8_t> ids;
  for (const std::int32_t length : lengths) {
    routing.emplace_back();
    for (std::size_t l = 0; l < layers; ++l) {
      auto tokens = random_tokens(random, experts, k, static_cast<std::size_t>(length));
      for (const Token& token : tokens) ids.insert(ids.end(), token.begin(), token.end());
      ids.resize(ids.size() + (longest - tokens.size()) * k, 0);
      routing.back().push_back(std::move(tokens));
    }
  }
  const TraceView trace{std::span<const std::uint8_t>(ids), lengths, layers, longest, k, experts};
  check_trace(trace);
  ThreadPool pool(2);
  for (const char* policy : {"lru", "lfu", "lcp"}) {
    for (const bool restart : {false, true}) {
      const auto found = slot_hits(trace, policy, restart, pool);
      for (std::size_t l = 0; l < layers; ++l) {
        for (std::size_t n = 0; n <= experts; ++n) {
          std::uint64_t hits = 0;
          PlainCache cache(make_cache_policy(policy, experts), n);
          for (const auto& sequence : routing) {
            if (restart) cache = PlainCache(make_cache_policy(policy, experts), n);
            for (const Token& token : sequence[l]) hits += cache.decode(token);
          }
          CHECK_EQ(found[l * (experts + 1) + n], hits);
        }
      }
      const auto most = slot_hits(trace, "optimal", restart, pool);
      for (std::size_t i = 0; i < most.size(); ++i) CHECK(found[i] <= most[i]);
    }
  }
  CHECK_THROWS(InvalidArgument, slot_hits(trace, "mru", false, pool), "mru", "lcp");
}

TEST("slot_statistics: as one cache for each number of slots, token by token") {
  std::mt19937 random(19);
  ThreadPool pool(2);
  for (int round = 0; round < 40; ++round) {
    const std::size_t experts = 2 + random() % 10;
    const std::size_t k = 1 + random() % experts;
    const std::size_t count = 30;
    const auto tokens = random_tokens(random, experts, k, count);
    auto named = random_tokens(random, experts, k, count);
    named[0].assign(k, kNoExpert);
    const Flat routing(tokens, experts);
    Token guesses;
    for (const Token& each : named) guesses.insert(guesses.end(), each.begin(), each.end());
    const std::vector<std::int32_t> lengths = {static_cast<std::int32_t>(count)};
    const TraceView trace{
        std::span<const std::uint16_t>(routing.ids), lengths, 1, count, k, experts};
    Token ranking(experts);
    for (std::size_t e = 0; e < experts; ++e) ranking[e] = static_cast<std::uint16_t>(e);
    std::shuffle(ranking.begin(), ranking.end(), random);
    for (const std::string policy : {"lru", "lfu", "lcp", "static"}) {
      const auto found = slot_statistics(trace, guesses, policy, ranking, false, pool).at(0);
      CHECK_EQ(found.num_tokens, count);
      for (std::size_t n = 0; n <= experts; ++n) {
        PolicyParams params;
        params.static_experts.assign(ranking.begin(), ranking.begin() + static_cast<long>(n));
        PlainCache cache(make_cache_policy(policy, experts, params), n);
        if (policy == "static") {
          cache.fill({ranking.begin(), ranking.begin() + static_cast<long>(n)});
        }
        SlotStatistics plain;
        plain.missing.assign(k + 1, 0);
        plain.right.assign(k, 0);
        plain.absent.assign(k, 0);
        plain.absent_right.assign(k, 0);
        for (std::size_t t = 0; t < count; ++t) {
          const auto residents = cache.residents();
          for (std::size_t r = 0; r < k && named[t][r] != kNoExpert; ++r) {
            const bool is_right =
                std::find(tokens[t].begin(), tokens[t].end(), named[t][r]) != tokens[t].end();
            plain.right[r] += is_right;
            plain.absent[r] += !residents.contains(named[t][r]);
            plain.absent_right[r] += is_right && !residents.contains(named[t][r]);
          }
          ++plain.missing[k - cache.decode(tokens[t])];
        }
        CHECK(plain.right == found.right);
        for (std::size_t x = 0; x <= k; ++x) {
          CHECK_EQ(found.missing[x * (experts + 1) + n], plain.missing[x]);
        }
        for (std::size_t r = 0; r < k; ++r) {
          CHECK_EQ(found.absent[r * (experts + 1) + n], plain.absent[r]);
          CHECK_EQ(found.absent_right[r * (experts + 1) + n], plain.absent_right[r]);
        }
      }
    }
    const auto ideal = slot_statistics(trace, {}, "optimal", {}, false, pool).at(0);
    const auto most = most_hits(routing.view);
    for (std::size_t n = 0; n <= experts; ++n) {
      std::uint64_t hits = 0;
      for (std::size_t x = 0; x <= k; ++x) hits += (k - x) * ideal.missing[x * (experts + 1) + n];
      CHECK_EQ(hits, most[n]);
    }
    CHECK_THROWS(InvalidArgument, slot_statistics(trace, {}, "fifo", {}, false, pool), "fifo");
    CHECK_THROWS(InvalidArgument, slot_statistics(trace, {}, "static", {}, false, pool), "ranking");
    guesses.back() = static_cast<std::uint16_t>(experts);
    CHECK_THROWS(InvalidArgument, slot_statistics(trace, guesses, "lru", {}, false, pool),
                 "expected experts from 0");
    guesses.pop_back();
    CHECK_THROWS(InvalidArgument, slot_statistics(trace, guesses, "lru", {}, false, pool),
                 "as the trace has");
  }
}

}  // namespace
}  // namespace moerun::test
