// What the kernels of attention() are given; attention.cu chooses between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

struct AttentionArguments {
  const float* q;  // (tokens, num_heads * head_dim, and k and v, which nobody reads)
  std::size_t q_pitch;
  const float* keys;    // (num_kv_heads, capacity, kv_pitch)
  const float* values;  // the same
  std::size_t capacity;
  std::size_t kv_pitch;
  float* out;  // (tokens, num_heads * head_dim)
  std::size_t out_pitch;
  float* scratch;
  std::size_t first_position;              // the largest that may be on the device, if it is there
  const std::int32_t* position_on_device;  // one token only; null: first_position
  std::size_t window;                      // 0: none
  unsigned tokens;
  unsigned num_heads;
  unsigned num_kv_heads;
  unsigned head_dim;
  float scale;
};

// One token: the keys are split among blocks. Takes scratch.
std::size_t decode_scratch_floats(std::size_t num_heads, std::size_t head_dim,
                                  std::size_t num_keys);
void launch_attention_decode(StreamHandle stream, const AttentionArguments& arguments);
// One token of each of several sequences, in the place of what the arguments say of keys and values
// and their number. Takes as much scratch for each as for the longest of them.
void launch_attention_decode_each(StreamHandle stream, const AttentionArguments& arguments,
                                  std::span<const SequenceRows> sequences);
// Several tokens: tiles of tokens go over tiles of keys, in float32 or on tensor cores.
void launch_attention_prefill(StreamHandle stream, const AttentionArguments& arguments);
void launch_attention_prefill_tf32(StreamHandle stream, const AttentionArguments& arguments);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
