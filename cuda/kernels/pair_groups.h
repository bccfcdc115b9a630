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
  // x as tensor cores take it, (tokens, padded(hidden_size)): in bf16 for experts in bf16, and in
  // tf32 for those in F16; null where there are none.
  std::uint16_t* x_bf16;
  float* x_tf32;
};

// Where they lie in `scratch`, which starts on a 256-byte border, and how much they take of it; a
// null scratch only measures.
PairGroups pair_groups_in(std::byte* scratch, const ExpertShape& shape, std::size_t tokens,
                          std::size_t slots, std::size_t& bytes);

void group_pairs(StreamHandle stream, const ExpertWork& work, const PairGroups& groups);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
