// Who uses which expert: (token, slot) pairs by expert, for the kernels of many tokens.
#pragma once

#include "kernels/launch.h"
#include "kernels/segment_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Device memory that group_pairs() fills.
struct PairGroups {
  std::int32_t* expert_ids;    // (pairs): those of the routing, which may lie in host memory
  std::int32_t* expert_begin;  // (num_experts + 2) into `pairs`; the last is their number
  std::int32_t* pairs;         // (pairs): by expert, those of one in rising order
  std::uint16_t* x;            // (tokens, padded(hidden_size)): x in bf16
};

// Where they lie in `scratch`, which starts on a 256-byte border, and how much they take of it; a
// null scratch only measures.
PairGroups pair_groups_in(std::byte* scratch, const ExpertShape& shape, std::size_t tokens,
                          std::size_t slots, std::size_t& bytes);

void group_pairs(StreamHandle stream, const ExpertWork& work, const PairGroups& groups);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
