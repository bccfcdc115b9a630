#include "model/batch_swaps.h"

#include <algorithm>

namespace moerun {
namespace {

// A row of swaps ends after so many that did not lower the price: what follows hardly ever does.
constexpr std::size_t kPatience = 16;
// An expert of a sequence that moves takes as long as so many of its users.
constexpr std::size_t kExpertSteps = 8;

}  // namespace

BatchSwaps::BatchSwaps(const PathIncidence& paths, std::size_t num_batches)
    : paths_(paths),
      num_batches_(num_batches),
      batch_of_(paths.num_sequences(), 0),
      counts_(num_batches * paths.num_experts(), 0),
      move_cost_(paths.num_sequences(), 0),
      change_(num_batches, 0) {}

void BatchSwaps::assign(std::span<const std::uint32_t> batch_of) {
  batch_of_.assign(batch_of.begin(), batch_of.end());
  std::fill(counts_.begin(), counts_.end(), 0);
  for (std::size_t i = 0; i < batch_of.size(); ++i) {
    std::uint32_t* counts = counts_of(batch_of[i]);
    for (const std::uint32_t expert : paths_.experts_of(i)) ++counts[expert];
  }
}

std::size_t BatchSwaps::num_active() const {
  return counts_.size() - static_cast<std::size_t>(std::count(counts_.begin(), counts_.end(), 0u));
}

void BatchSwaps::refine(std::span<const std::int64_t> price, WorkBudget& work) {
  const auto num_batches = static_cast<std::uint32_t>(num_batches_);
  bool improved = true;
  while (improved && !work.is_spent()) {
    improved = false;
    for (std::uint32_t a = 0; a < num_batches; ++a) {
      for (std::uint32_t b = a + 1; b < num_batches; ++b) {
        while (!work.is_spent() && improve_pair(a, b, price, work)) improved = true;
      }
    }
    if (num_batches == 2) break;  // with more, one pair's swaps may open another's
  }
}

// Kernighan and Lin: the cheapest of `a` to move, then the cheapest of `b`, even where that costs
// something, and none twice; in the end only the swaps up to the cheapest point stay.
bool BatchSwaps::improve_pair(std::uint32_t a, std::uint32_t b, std::span<const std::int64_t> price,
                              WorkBudget& work) {
  std::vector<std::uint32_t> of_a;
  std::vector<std::uint32_t> of_b;
  for (std::uint32_t i = 0; i < batch_of_.size(); ++i) {
    if (batch_of_[i] == a) of_a.push_back(i);
    if (batch_of_[i] == b) of_b.push_back(i);
  }
  find_move_costs(a, b, price);
  work.spend(batch_of_.size());
  for (const auto* members : {&of_a, &of_b}) {
    for (const std::uint32_t i : *members) work.spend(2 * paths_.experts_of(i).size() + 1);
  }
  std::vector<Swap> swaps;
  std::int64_t change = 0;
  std::int64_t best_change = 0;
  std::size_t num_kept = 0;
  while (!of_a.empty() && !of_b.empty() && swaps.size() - num_kept < kPatience &&
         !work.is_spent()) {
    work.spend(of_a.size() + of_b.size());
    const std::uint32_t leaves_a = cheapest(of_a);
    change += move_cost_[leaves_a];
    move(leaves_a, b, price, work);
    const std::uint32_t leaves_b = cheapest(of_b);
    change += move_cost_[leaves_b];
    move(leaves_b, a, price, work);
    swaps.emplace_back(leaves_a, leaves_b);
    if (change < best_change) {
      best_change = change;
      num_kept = swaps.size();
    }
  }
  for (; swaps.size() > num_kept; swaps.pop_back()) {
    move_back(swaps.back().second, b);
    move_back(swaps.back().first, a);
  }
  return num_kept > 0;
}

void BatchSwaps::find_move_costs(std::uint32_t a, std::uint32_t b,
                                 std::span<const std::int64_t> price) {
  for (std::size_t i = 0; i < batch_of_.size(); ++i) {
    if (batch_of_[i] != a && batch_of_[i] != b) continue;
    const std::uint32_t* here = counts_of(batch_of_[i]);
    const std::uint32_t* there = counts_of(batch_of_[i] == a ? b : a);
    std::int64_t cost = 0;
    for (const std::uint32_t expert : paths_.experts_of(i)) {
      cost += price[there[expert]] - price[here[expert] - 1];
    }
    move_cost_[i] = cost;
  }
}

// The first of those that cost least to move; it is no longer open.
std::uint32_t BatchSwaps::cheapest(std::vector<std::uint32_t>& open) {
  const auto found = std::min_element(
      open.begin(), open.end(),
      [this](std::uint32_t i, std::uint32_t j) { return move_cost_[i] < move_cost_[j]; });
  const std::uint32_t sequence = *found;
  open.erase(found);
  return sequence;
}

void BatchSwaps::move(std::uint32_t sequence, std::uint32_t to, std::span<const std::int64_t> price,
                      WorkBudget& work) {
  const std::uint32_t from = batch_of_[sequence];
  std::uint32_t* here = counts_of(from);
  std::uint32_t* there = counts_of(to);
  batch_of_[sequence] = to;
  const auto experts = paths_.experts_of(sequence);
  work.spend(kExpertSteps * experts.size());
  for (const std::uint32_t expert : experts) {
    const std::uint32_t num_here = --here[expert];
    const std::uint32_t num_there = there[expert]++;
    // What following, and what going the other way, costs the other users more than before.
    const std::int64_t follow = num_here == 0 ? 0
                                              : price[num_there + 1] - price[num_there] +
                                                    price[num_here] - price[num_here - 1];
    const std::int64_t oppose = num_there == 0 ? 0
                                               : price[num_here] - price[num_here + 1] +
                                                     price[num_there - 1] - price[num_there];
    if (follow == 0 && oppose == 0) continue;
    change_[from] = follow;
    change_[to] = oppose;
    const auto users = paths_.users_of(expert);
    work.spend(users.size());
    for (const std::uint32_t user : users) move_cost_[user] += change_[batch_of_[user]];
  }
  change_[from] = change_[to] = 0;
}

void BatchSwaps::move_back(std::uint32_t sequence, std::uint32_t to) {
  std::uint32_t* here = counts_of(batch_of_[sequence]);
  std::uint32_t* there = counts_of(to);
  for (const std::uint32_t expert : paths_.experts_of(sequence)) {
    --here[expert];
    ++there[expert];
  }
  batch_of_[sequence] = to;
}

}  // namespace moerun
