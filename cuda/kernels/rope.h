// Rotary position embedding, and the way of keys and values into the KV cache.
#pragma once

#include <cstddef>
#include <span>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Normalises, clamps (v too) and rotates q and k of qkv (tokens, (heads + 2 kv_heads) * head_dim)
// in place, and writes k and v at positions first_position, ... of the KV cache. inv_freq and the
// norms' weights lie on the device; head_dim is even.
void rotate_and_store(StreamHandle stream, const AttentionShape& shape, const RotaryParams& rotary,
                      Position first_position, Activations qkv, const KvLayer& kv);

// The same for the next token of each of several sequences, row s of qkv being that of sequence s,
// in one launch: the same bits. InvalidArgument for more than kMaxSequences, or for a sequence with
// more rows than one. All KV caches have the same pitch.
void rotate_and_store_each(StreamHandle stream, const AttentionShape& shape,
                           const RotaryParams& rotary, std::span<const SequenceRows> sequences,
                           Activations qkv);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
