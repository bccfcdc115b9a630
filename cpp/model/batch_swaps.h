// Batches of sequences, and swaps between them that lower a price for the experts they use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "model/path_incidence.h"
#include "model/work_budget.h"

namespace moerun {

class BatchSwaps {
 public:
  BatchSwaps(const PathIncidence& paths, std::size_t num_batches);

  // Starts from this: the batch of each sequence.
  void assign(std::span<const std::uint32_t> batch_of);
  std::span<const std::uint32_t> batch_of() const { return batch_of_; }
  // The sum over batches of the experts that at least one of its sequences uses.
  std::size_t num_active() const;

  // Swaps until no row of swaps between two batches is found that lowers the sum of prices, or the
  // work is done. price[n] is what an expert's user in a batch costs that has n others; it falls
  // with n, and is given for as many n as there are sequences. With a price of 1 for the first user
  // and 0 for all others, the sum is num_active().
  void refine(std::span<const std::int64_t> price, WorkBudget& work);

 private:
  using Swap = std::pair<std::uint32_t, std::uint32_t>;

  bool improve_pair(std::uint32_t a, std::uint32_t b, std::span<const std::int64_t> price,
                    WorkBudget& work);
  void find_move_costs(std::uint32_t a, std::uint32_t b, std::span<const std::int64_t> price);
  std::uint32_t cheapest(std::vector<std::uint32_t>& open);
  void move(std::uint32_t sequence, std::uint32_t to, std::span<const std::int64_t> price,
            WorkBudget& work);
  void move_back(std::uint32_t sequence, std::uint32_t to);
  std::uint32_t* counts_of(std::uint32_t batch) {
    return counts_.data() + batch * paths_.num_experts();
  }

  const PathIncidence& paths_;
  std::size_t num_batches_;
  std::vector<std::uint32_t> batch_of_;  // of each sequence
  std::vector<std::uint32_t> counts_;    // (batches, experts): users in the batch
  std::vector<std::int64_t> move_cost_;  // of each sequence of the pair, to the other of the two
  std::vector<std::int64_t> change_;     // of it, by batch; 0 but while it is applied
};

}  // namespace moerun
