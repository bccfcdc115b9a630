// Attention of one token in parts: attention_decode.cu computes, attention_combine.cu adds them.
#pragma once

#include <cstddef>

#include "kernels/attention_kernels.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kMaxSplits = 64;

// Which keys a block reads, each split a run of tiles: a function of their number only.
struct Splits {
  std::size_t keys_per_split;
  unsigned count;
};

// Of a partial result in scratch, (num_heads, splits) of them: head_dim sums, the largest score,
// the sum of exponentials.
inline constexpr unsigned kPartialExtra = 4;

struct DecodeArguments {
  AttentionArguments all;
  std::size_t first_key;
  std::size_t end_key;
  Splits splits;
  unsigned head_blocks;      // that share the heads of one KV head
  unsigned lanes_per_value;  // a power of two, no less than head_dim / 4
};

// From the partial results in scratch to out.
void launch_attention_combine(StreamHandle stream, const DecodeArguments& arguments);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
