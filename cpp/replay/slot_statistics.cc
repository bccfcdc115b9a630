#include "replay/slot_statistics.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "base/error.h"
#include "replay/policy_replay.h"
#include "trace/routing_record.h"

namespace moerun {
namespace {

using Places = std::function<std::uint32_t(std::size_t expert)>;

// Counts at the places where something changes; sums at the end.
class SlotCounter {
 public:
  SlotCounter(std::size_t num_experts, std::size_t top_k)
      : num_experts_(num_experts), top_k_(top_k), sorted_(top_k) {
    found_.missing.assign((top_k + 1) * row(), 0);
    found_.right.assign(top_k, 0);
    found_.absent.assign(top_k * row(), 0);
    found_.absent_right.assign(top_k * row(), 0);
  }

  void count(std::span<const std::uint16_t> experts, std::span<const std::uint16_t> guesses,
             const Places& place_of) {
    ++found_.num_tokens;
    const auto depth_of = [&](std::uint16_t expert) {
      return std::min<std::size_t>(place_of(expert), num_experts_);
    };
    std::transform(experts.begin(), experts.end(), sorted_.begin(), depth_of);
    std::sort(sorted_.begin(), sorted_.end());
    // Up to the first expert's place all are missing, beyond it all but one, and so on.
    std::size_t first = 0;
    for (std::size_t hits = 0; hits <= top_k_; ++hits) {
      const std::size_t end = hits < top_k_ ? sorted_[hits] + 1 : row();
      std::uint64_t* missing = found_.missing.data() + (top_k_ - hits) * row();
      if (first < end) {
        missing[first] += 1;
        if (end < row()) missing[end] -= 1;  // wraps around; so does the sum
      }
      first = std::max(first, end);
    }
    for (std::size_t r = 0; r < guesses.size() && guesses[r] != kNoExpert; ++r) {
      const bool is_right = std::find(experts.begin(), experts.end(), guesses[r]) != experts.end();
      const std::size_t place = r * row() + depth_of(guesses[r]);
      found_.right[r] += is_right;
      ++found_.absent[place];
      found_.absent_right[place] += is_right;
    }
  }

  SlotStatistics finish() {
    for (std::size_t x = 0; x <= top_k_; ++x) {
      const auto begin = found_.missing.begin() + static_cast<std::ptrdiff_t>(x * row());
      std::partial_sum(begin, begin + static_cast<std::ptrdiff_t>(row()), begin);
    }
    // At n slots, what has its place at n or beyond is absent.
    for (auto* table : {&found_.absent, &found_.absent_right}) {
      for (std::size_t r = 0; r < top_k_; ++r) {
        for (std::size_t n = num_experts_; n-- > 0;) {
          (*table)[r * row() + n] += (*table)[r * row() + n + 1];
        }
      }
    }
    return std::move(found_);
  }

 private:
  std::size_t row() const { return num_experts_ + 1; }

  std::size_t num_experts_;
  std::size_t top_k_;
  std::vector<std::size_t> sorted_;
  SlotStatistics found_;
};

// The tokens of a layer, of one sequence or of all of them in a row, with their guesses.
struct Tokens {
  std::vector<std::uint16_t> experts;
  std::vector<std::uint16_t> guesses;  // as many, or none
  std::size_t top_k = 0;
  std::size_t num_experts = 0;

  std::size_t size() const { return experts.size() / top_k; }
  RoutingView view() const { return {experts, top_k, num_experts}; }
  std::span<const std::uint16_t> guesses_of(std::size_t token) const {
    if (guesses.empty()) return {};
    return std::span(guesses).subspan(token * top_k, top_k);
  }
};

void count_policy(const Tokens& tokens, std::string_view policy, SlotCounter& counter) {
  PolicyReplay cache(make_cache_policy(policy, tokens.num_experts), tokens.num_experts);
  const Places place_of = [&](std::size_t expert) { return cache.place_of(expert); };
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    counter.count(tokens.view().token(t), tokens.guesses_of(t), place_of);
    cache.decode(tokens.view().token(t));
  }
}

void count_optimal(const Tokens& tokens, SlotCounter& counter) {
  most_hits(tokens.view(), [&](std::size_t t, const SlotStack& stack) {
    counter.count(tokens.view().token(t), tokens.guesses_of(t),
                  [&](std::size_t expert) { return stack.place_of(expert); });
  });
}

void count_static(const Tokens& tokens, std::span<const std::uint16_t> ranking,
                  SlotCounter& counter) {
  std::vector<std::uint32_t> places(tokens.num_experts);
  for (std::size_t place = 0; place < ranking.size(); ++place) {
    places[ranking[place]] = static_cast<std::uint32_t>(place);
  }
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    counter.count(tokens.view().token(t), tokens.guesses_of(t),
                  [&](std::size_t expert) { return places[expert]; });
  }
}

void append(const TraceView& trace, std::span<const std::uint16_t> guesses, std::size_t sequence,
            std::size_t layer, Tokens& tokens) {
  std::vector<std::uint16_t> memory;
  const RoutingView view = trace.of_layer(sequence, layer, memory);
  tokens.experts.insert(tokens.experts.end(), view.expert_ids.begin(), view.expert_ids.end());
  if (guesses.empty()) return;
  const std::size_t of_layer = trace.num_tokens * trace.slots;
  const auto own =
      guesses.subspan((sequence * trace.num_layers + layer) * of_layer, view.expert_ids.size());
  for (const std::uint16_t guess : own) {
    if (guess < trace.num_experts || guess == kNoExpert) continue;
    throw InvalidArgument(message("guesses: sequence ", sequence, ", layer ", layer,
                                  ": expected experts from 0 to ", trace.num_experts - 1, ", or ",
                                  kNoExpert, " for none, found ", guess));
  }
  tokens.guesses.insert(tokens.guesses.end(), own.begin(), own.end());
}

void check(const TraceView& trace, std::span<const std::uint16_t> guesses, std::string_view policy,
           std::span<const std::uint16_t> ranking) {
  const bool is_known = policy == "lru" || policy == "lfu" || policy == "lcp" ||
                        policy == "optimal" || policy == "static";
  if (!is_known) {
    throw InvalidArgument(
        message("policy: expected lru, lfu, lcp, static or optimal, found '", policy, "'"));
  }
  const std::size_t ids = trace.num_sequences() * trace.num_layers * trace.num_tokens * trace.slots;
  if (!guesses.empty() && guesses.size() != ids) {
    throw InvalidArgument(
        message("guesses: expected ", ids, " ids, as the trace has, found ", guesses.size()));
  }
  if (policy != "static") return;
  const std::size_t ranks = trace.num_layers * trace.num_experts;
  const bool in_range = std::all_of(ranking.begin(), ranking.end(),
                                    [&](std::uint16_t id) { return id < trace.num_experts; });
  if (ranking.size() == ranks && in_range) return;
  throw InvalidArgument(message("ranking: expected the ", trace.num_experts, " experts of each of ",
                                trace.num_layers, " layers, found ", ranking.size(), " ids"));
}

}  // namespace

std::vector<SlotStatistics> slot_statistics(const TraceView& trace,
                                            std::span<const std::uint16_t> guesses,
                                            std::string_view policy,
                                            std::span<const std::uint16_t> ranking, bool restart,
                                            ThreadPool& pool) {
  check(trace, guesses, policy, ranking);
  std::vector<SlotStatistics> found(trace.num_layers);
  pool.parallel_for(trace.num_layers, [&](std::size_t layer, int) {
    SlotCounter counter(trace.num_experts, trace.slots);
    Tokens tokens;
    tokens.top_k = trace.slots;
    tokens.num_experts = trace.num_experts;
    const auto replay = [&] {
      if (policy == "optimal") {
        count_optimal(tokens, counter);
      } else if (policy == "static") {
        count_static(tokens, ranking.subspan(layer * trace.num_experts, trace.num_experts),
                     counter);
      } else {
        count_policy(tokens, policy, counter);
      }
      tokens.experts.clear();
      tokens.guesses.clear();
    };
    for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
      append(trace, guesses, s, layer, tokens);
      if (restart) replay();
    }
    if (!restart) replay();
    found[layer] = counter.finish();
  });
  return found;
}

}  // namespace moerun
