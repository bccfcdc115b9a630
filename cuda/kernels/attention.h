// Causal attention over the KV cache.
#pragma once

#include <cstddef>
#include <span>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr std::size_t kMaxHeadDim = 256;

// Scratch memory for up to max_tokens tokens and positions below capacity.
std::size_t attention_scratch_bytes(const AttentionShape& shape, std::size_t max_tokens,
                                    std::size_t capacity);

// Of the q in qkv over the KV cache up to each token's own position. A token's result is the same
// bits beside any other tokens, but one token alone is computed by another kernel than several: in
// float32, whatever params say of rounding. `scratch`, of the device, is used until the stream has
// run this. InvalidArgument unless head_dim is a multiple of 4 up to kMaxHeadDim and scratch is
// large enough.
void attention(StreamHandle stream, const AttentionShape& shape, const AttentionParams& params,
               Position first_position, Activations qkv, const KvLayer& kv, Activations out,
               float* scratch, std::size_t scratch_bytes);

// The same for the next token of each of several sequences, row s of qkv and out being that of
// sequence s, in one launch: the bits of one token alone. InvalidArgument for more than
// kMaxSequences, or for a sequence with more rows than one.
void attention_each(StreamHandle stream, const AttentionShape& shape, const AttentionParams& params,
                    std::span<const SequenceRows> sequences, Activations qkv, Activations out,
                    float* scratch, std::size_t scratch_bytes);

// Scratch memory for that, with positions below capacity.
std::size_t attention_each_scratch_bytes(const AttentionShape& shape, std::size_t num_sequences,
                                         std::size_t capacity);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
