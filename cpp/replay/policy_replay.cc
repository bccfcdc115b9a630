#include "replay/policy_replay.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

std::vector<std::uint64_t> running_sums(std::vector<std::uint64_t> counts) {
  std::partial_sum(counts.begin(), counts.end(), counts.begin());
  return counts;
}

// The routing of a layer's sequences, one after the other.
RoutingView joined(const TraceView& trace, std::size_t layer, std::vector<std::uint16_t>& all) {
  std::vector<std::uint16_t> one;
  all.clear();
  for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
    const RoutingView view = trace.of_layer(s, layer, one);
    all.insert(all.end(), view.expert_ids.begin(), view.expert_ids.end());
  }
  return {all, trace.slots, trace.num_experts};
}

}  // namespace

PolicyReplay::PolicyReplay(std::unique_ptr<CachePolicy> policy, std::size_t num_experts)
    : policy_(std::move(policy)), stack_(num_experts), hits_at_(num_experts + 1, 0) {}

void PolicyReplay::fill(std::span<const std::uint16_t> experts) {
  for (const std::uint16_t expert : experts) {
    if (policy_->admits(expert)) stack_.append(expert);
  }
}

void PolicyReplay::decode(std::span<const std::uint16_t> experts) {
  policy_->begin_token();
  served_.clear();
  num_lookups_ += experts.size();
  for (const std::uint16_t expert : experts) {
    const std::uint32_t place = stack_.place_of(expert);
    if (place != SlotStack::kAbsent) ++hits_at_[place + 1];
    // All at once: a victim is never of this token, and the others' uses stay as they are.
    policy_->access(expert);
    if (policy_->admits(expert)) served_.push_back(expert);
  }
  stack_.serve(served_, true, [this](std::size_t a, std::size_t b) {
    const std::array<std::size_t, 2> both = {a, b};
    return policy_->victim(both) == a;
  });
}

void PolicyReplay::decode(const RoutingView& routing) {
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) decode(routing.token(t));
}

std::vector<std::uint64_t> PolicyReplay::hits() const { return running_sums(hits_at_); }

std::vector<std::uint64_t> most_hits(
    const RoutingView& routing,
    const std::function<void(std::size_t token, const SlotStack&)>& before_token) {
  constexpr std::size_t kNever = std::numeric_limits<std::size_t>::max();
  // Keeping an expert from one use to the next takes a slot for that long and gives one hit. Of
  // more such stretches than slots, dropping the one that ends last is never wrong.
  std::vector<std::size_t> next_of(routing.expert_ids.size(), kNever);
  std::vector<std::size_t> next_use(routing.num_experts, kNever);
  for (std::size_t i = routing.expert_ids.size(); i-- > 0;) {
    next_of[i] = std::exchange(next_use[routing.expert_ids[i]], i / routing.slots);
  }
  SlotStack stack(routing.num_experts);
  std::vector<std::uint64_t> hits_at(routing.num_experts + 1, 0);
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    const auto experts = routing.token(t);
    if (before_token) before_token(t, stack);
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const std::uint32_t place = stack.place_of(experts[i]);
      if (place != SlotStack::kAbsent) ++hits_at[place + 1];
      next_use[experts[i]] = next_of[t * routing.slots + i];
    }
    stack.serve(experts, false, [&](std::size_t a, std::size_t b) {
      return next_use[a] > next_use[b] || (next_use[a] == next_use[b] && a > b);
    });
  }
  return running_sums(std::move(hits_at));
}

std::vector<std::uint64_t> slot_hits(const TraceView& trace, std::string_view policy, bool restart,
                                     ThreadPool& pool) {
  const bool is_bound = policy == "optimal";
  if (!is_bound && policy != "lru" && policy != "lfu" && policy != "lcp") {
    throw InvalidArgument(
        message("policy: expected lru, lfu, lcp or optimal, found '", policy, "'"));
  }
  const std::size_t row = trace.num_experts + 1;
  std::vector<std::uint64_t> hits(trace.num_layers * row, 0);
  pool.parallel_for(trace.num_layers, [&](std::size_t layer, int) {
    std::vector<std::uint64_t> own(row, 0);  // rows of other threads lie in the same cache lines
    std::vector<std::uint16_t> memory;
    const auto replay = [&](const RoutingView& routing) {
      std::vector<std::uint64_t> found;
      if (is_bound) {
        found = most_hits(routing);
      } else {
        PolicyReplay cache(make_cache_policy(policy, trace.num_experts), trace.num_experts);
        cache.decode(routing);
        found = cache.hits();
      }
      for (std::size_t n = 0; n < row; ++n) own[n] += found[n];
    };
    if (restart) {
      for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
        replay(trace.of_layer(s, layer, memory));
      }
    } else {
      replay(joined(trace, layer, memory));
    }
    std::copy(own.begin(), own.end(), hits.begin() + static_cast<std::ptrdiff_t>(layer * row));
  });
  return hits;
}

}  // namespace moerun
