// Paths as lists: the experts of each sequence, and the users of each expert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "model/routing_paths.h"

namespace moerun {

// Only experts whose part in the batches a split can change: those of one sequence are active in
// one batch, those of nearly all sequences in every batch, whatever the split.
class PathIncidence {
 public:
  // `paths` as check_paths wants them. An expert is left out if fewer than 2 sequences use it, or
  // fewer than `smallest_batch` do not.
  PathIncidence(const RoutingPaths& paths, std::size_t smallest_batch);

  std::size_t num_sequences() const { return first_expert_.size() - 1; }
  std::size_t num_experts() const { return first_user_.size() - 1; }
  // Both in rising order.
  std::span<const std::uint32_t> experts_of(std::size_t sequence) const;
  std::span<const std::uint32_t> users_of(std::size_t expert) const;

 private:
  std::vector<std::uint32_t> experts_;     // of all sequences, one after the other
  std::vector<std::size_t> first_expert_;  // of each sequence, and the end
  std::vector<std::uint32_t> users_;       // of all experts, one after the other
  std::vector<std::size_t> first_user_;    // of each expert, and the end
};

}  // namespace moerun
