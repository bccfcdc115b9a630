// Attention of one token in parts: attention_decode.cu computes, attention_combine.cu adds them.
#pragma once

#include <cstddef>

#include "kernels/attention_kernels.h"
#include "kernels/intrinsics.h"
#include "kernels/sequence_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kMaxSplits = 64;
inline constexpr unsigned kTileKeys = 64;  // whose scores a block holds

// Which keys a token sees, and how they are split among blocks, each a run of tiles: a function of
// their number only.
struct Splits {
  std::size_t first_key;
  std::size_t end_key;
  std::size_t keys_per_split;
  unsigned count;
};

// Of a partial result in scratch, (num_heads, splits) of them: head_dim sums, the largest score,
// the sum of exponentials.
inline constexpr unsigned kPartialExtra = 4;

struct DecodeArguments {
  AttentionArguments all;
  unsigned head_blocks;      // that share the heads of one KV head
  unsigned lanes_per_value;  // a power of two, no less than head_dim / 4
};

// One token of each of several sequences; block_z() says which.
struct DecodeEachArguments : DecodeArguments {  // `all` without keys, values, capacity and position
  std::size_t scratch_floats;                   // of one sequence
  SequenceList sequences;
};

// What the kernels of a token compute with.
MOERUN_DEVICE AttentionArguments own_arguments(const DecodeArguments& arguments) {
  return arguments.all;
}
MOERUN_DEVICE AttentionArguments own_arguments(const DecodeEachArguments& arguments) {
  const SequenceEntry& sequence = arguments.sequences.entries[block_z()];
  AttentionArguments own = arguments.all;
  own.q += block_z() * own.q_pitch;
  own.out += block_z() * own.out_pitch;
  own.scratch += block_z() * arguments.scratch_floats;
  own.keys = sequence.keys;
  own.values = sequence.values;
  own.capacity = sequence.capacity;
  own.first_position = sequence.position;
  return own;
}

MOERUN_HOST_DEVICE Splits split_keys(std::size_t position, std::size_t window) {
  const std::size_t end = position + 1;
  const std::size_t first = window != 0 && end > window ? end - window : 0;
  const std::size_t num_tiles = (end - first + kTileKeys - 1) / kTileKeys;
  const std::size_t tiles_per_split = (num_tiles + kMaxSplits - 1) / kMaxSplits;
  return {first, end, tiles_per_split * kTileKeys,
          static_cast<unsigned>((num_tiles + tiles_per_split - 1) / tiles_per_split)};
}

MOERUN_DEVICE Splits splits_of(const AttentionArguments& a) {
  const std::size_t position = a.position_on_device != nullptr
                                   ? static_cast<std::size_t>(*a.position_on_device)
                                   : a.first_position;
  return split_keys(position, a.window);
}

// From the partial results in scratch to out.
void launch_attention_combine(StreamHandle stream, const DecodeArguments& arguments);
void launch_attention_combine(StreamHandle stream, const DecodeEachArguments& arguments,
                              std::size_t num_sequences);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
