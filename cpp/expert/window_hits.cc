#include "expert/window_hits.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <utility>

#include "trace/routing_record.h"

namespace moerun {
namespace {

constexpr std::uint32_t kNever = std::numeric_limits<std::uint32_t>::max();

// A set of numbers below a bound that finds its largest in a few steps.
class NumberSet {
 public:
  explicit NumberSet(std::size_t bound) {
    do {
      bound = (bound + 63) / 64;
      levels_.emplace_back(bound, 0);
    } while (bound > 1);
  }

  std::size_t size() const { return size_; }

  void insert(std::size_t number) {
    if (has(number)) return;
    ++size_;
    for (auto& level : levels_) {
      level[number / 64] |= std::uint64_t{1} << number % 64;
      number /= 64;
    }
  }

  // Whether it was there.
  bool take(std::size_t number) {
    if (!has(number)) return false;
    --size_;
    for (auto& level : levels_) {
      level[number / 64] &= ~(std::uint64_t{1} << number % 64);
      if (level[number / 64] != 0) break;
      number /= 64;
    }
    return true;
  }

  void take_largest() {
    std::size_t number = 0;
    for (auto level = levels_.rbegin(); level != levels_.rend(); ++level) {
      number = number * 64 + static_cast<std::size_t>(std::bit_width((*level)[number])) - 1;
    }
    take(number);
  }

 private:
  bool has(std::size_t number) const {
    return (levels_.front()[number / 64] >> number % 64 & 1) != 0;
  }

  std::vector<std::vector<std::uint64_t>>
      levels_;  // a bit says that 64 of the level below have one
  std::size_t size_ = 0;
};

std::size_t num_experts_of(const RoutingHistory::Layer& layer) {
  std::size_t most = 0;
  const auto count = [&](std::uint16_t expert) {
    if (expert != kNoExpert) most = std::max<std::size_t>(most, expert + std::size_t{1});
  };
  for (const std::uint16_t expert : layer.expert_ids) count(expert);
  for (const std::uint16_t expert : layer.start) count(expert);
  for (const auto& offer : layer.offers) count(offer.expert);
  return most;
}

std::uint64_t static_hits(const RoutingHistory::Layer& layer, std::size_t num_experts,
                          std::size_t num_slots) {
  std::vector<std::uint64_t> uses(num_experts, 0);
  for (const std::uint16_t expert : layer.expert_ids) {
    if (expert != kNoExpert) ++uses[expert];
  }
  std::sort(uses.begin(), uses.end(), std::greater<>());
  std::uint64_t hits = 0;
  for (std::size_t i = 0; i < std::min(num_slots, uses.size()); ++i) hits += uses[i];
  return hits;
}

// Keeping an expert until its next use takes a slot for that long and brings one hit. Of more such
// stretches than slots, dropping the one that ends last is never wrong. What is offered again
// before its next use need not be kept until then. `held` has the places in expert_ids where the
// stretches that are kept end.
std::uint64_t optimal_hits(const RoutingHistory::Layer& layer, std::size_t num_experts,
                           std::size_t top_k, std::size_t num_slots) {
  const auto& ids = layer.expert_ids;
  if (num_slots == 0 || ids.empty()) return 0;
  std::vector<std::uint32_t> next_of(ids.size(), kNever);
  std::vector<std::uint32_t> upcoming(num_experts, kNever);
  for (std::size_t i = ids.size(); i-- > 0;) {
    if (ids[i] == kNoExpert) continue;
    next_of[i] = std::exchange(upcoming[ids[i]], static_cast<std::uint32_t>(i));
  }
  std::vector<std::uint32_t> next_offer_of(layer.offers.size(), kNever);
  std::vector<std::uint32_t> upcoming_offer(num_experts, kNever);  // its token's first place
  for (std::size_t i = layer.offers.size(); i-- > 0;) {
    const auto place = static_cast<std::uint32_t>(layer.offers[i].token * top_k);
    next_offer_of[i] = std::exchange(upcoming_offer[layer.offers[i].expert], place);
  }
  NumberSet held(ids.size());
  const auto hold = [&](std::uint16_t expert) {
    const std::uint32_t next_use = upcoming[expert];
    if (next_use != kNever && next_use < upcoming_offer[expert]) held.insert(next_use);
  };
  const auto drop_what_does_not_fit = [&] {
    while (held.size() > num_slots) held.take_largest();
  };
  for (const std::uint16_t expert : layer.start) hold(expert);
  std::uint64_t hits = 0;
  std::size_t offer = 0;
  for (std::size_t first = 0; first < ids.size(); first += top_k) {
    for (; offer < layer.offers.size() && layer.offers[offer].token * top_k <= first; ++offer) {
      upcoming_offer[layer.offers[offer].expert] = next_offer_of[offer];
      hold(layer.offers[offer].expert);
    }
    drop_what_does_not_fit();
    for (std::size_t i = first; i < first + top_k; ++i) hits += held.take(i);
    for (std::size_t i = first; i < first + top_k; ++i) {
      if (ids[i] == kNoExpert) continue;
      upcoming[ids[i]] = next_of[i];
      hold(ids[i]);
    }
    drop_what_does_not_fit();
  }
  return hits;
}

}  // namespace

WindowHits window_hits(const RoutingHistory& history, std::span<const std::size_t> num_slots) {
  WindowHits hits;
  hits.num_tokens = history.num_tokens;
  for (std::size_t i = 0; i < history.layers.size(); ++i) {
    const RoutingHistory::Layer& layer = history.layers[i];
    const std::size_t num_experts = num_experts_of(layer);
    WindowLayerHits counts;
    counts.lookups =
        layer.expert_ids.size() - static_cast<std::size_t>(std::count(
                                      layer.expert_ids.begin(), layer.expert_ids.end(), kNoExpert));
    counts.live = layer.hits;
    counts.best_static = static_hits(layer, num_experts, num_slots[i]);
    counts.optimal = optimal_hits(layer, num_experts, history.top_k, num_slots[i]);
    hits.layers.push_back(counts);
  }
  return hits;
}

}  // namespace moerun
