// Balanced clusters of sequences with similar paths, each around one of them: its medoid.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "model/path_incidence.h"
#include "model/work_budget.h"

namespace moerun {

// Hamming distances of all pairs of paths.
class PathDistances {
 public:
  // Every expert takes a step for each pair of its users. Where that is more than some millions in
  // all, every second, third ... expert stands for the others.
  PathDistances(const PathIncidence& paths, WorkBudget& work);

  std::size_t num_sequences() const { return num_sequences_; }
  std::uint32_t operator()(std::size_t a, std::size_t b) const {
    return distances_[a * num_sequences_ + b];
  }

 private:
  std::size_t num_sequences_;
  std::vector<std::uint32_t> distances_;  // (sequences, sequences)
};

// The batch of each sequence. The first batch starts around `first`, each other one around the
// sequence farthest from those before; then, in turns, the sequences go to the nearest medoid that
// has room, those with the clearest preference first, and the medoid of a batch becomes the one
// nearest to all of its batch. `sizes`: at least 1 each, as many as there are sequences in all.
std::vector<std::uint32_t> medoid_batches(const PathDistances& distances,
                                          std::span<const std::size_t> sizes, std::size_t first,
                                          WorkBudget& work);

// One of the two that are farthest apart; the first such.
std::size_t outermost(const PathDistances& distances);

}  // namespace moerun
