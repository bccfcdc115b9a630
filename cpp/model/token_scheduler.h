// Which of the waiting sequences to run together: those that are predicted to use the same experts
// (the token scheduler of ExpertFlow, arXiv 2410.17954). docs/batching.md says how it searches.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "model/routing_paths.h"

namespace moerun {

// Most sequences that can be split at once: the search keeps the distances of all pairs.
inline constexpr std::size_t kMaxWaiting = 4096;
inline constexpr std::size_t kMaxBatches = 64;

// Splits the sequences of `paths` into batches of the given sizes, so that the sum over batches of
// num_active_experts is small: never more than in order of arrival (the first batch has sequences 0
// to sizes[0] - 1, and so on), which is kept where nothing better is found. The same input has the
// same result. Returns the sequences of each batch in rising order; of batches of equal size, the
// one whose first sequence arrived first comes first.
// InvalidArgument for what check_paths refuses, sizes that do not add up to the number of
// sequences, or more sequences or batches than the most.
std::vector<std::vector<std::size_t>> split_batches(const RoutingPaths& paths,
                                                    std::span<const std::size_t> sizes);

}  // namespace moerun
