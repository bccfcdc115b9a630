// Rotary position embedding, and the way of keys and values into the KV cache.
#pragma once

#include <cstddef>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Normalises, clamps (v too) and rotates q and k of qkv (tokens, (heads + 2 kv_heads) * head_dim)
// in place, and writes k and v at positions first_position, ... of the KV cache. inv_freq and the
// norms' weights lie on the device; head_dim is even.
void rotate_and_store(StreamHandle stream, const AttentionShape& shape, const RotaryParams& rotary,
                      Position first_position, Activations qkv, const KvLayer& kv);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
