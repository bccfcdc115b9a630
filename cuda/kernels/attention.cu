#include "kernels/attention.h"

#include <algorithm>

#include "kernels/attention_kernels.h"
#include "kernels/dtype_dispatch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

std::size_t attention_scratch_bytes(const AttentionShape& shape, std::size_t max_tokens,
                                    std::size_t capacity) {
  if (max_tokens == 0) return 0;
  return decode_scratch_floats(shape.num_heads, shape.head_dim, capacity) * sizeof(float);
}

void attention(StreamHandle stream, const AttentionShape& shape, const AttentionParams& params,
               Position first_position, Activations qkv, const KvLayer& kv, Activations out,
               float* scratch, std::size_t scratch_bytes) {
  if (qkv.rows == 0) return;
  if (shape.head_dim > kMaxHeadDim || shape.head_dim % 4 != 0) {
    throw InvalidArgument(message("attention: heads of ", shape.head_dim,
                                  "; the CUDA kernels take multiples of 4 up to ", kMaxHeadDim));
  }
  if (shape.num_kv_heads == 0 || shape.num_heads % shape.num_kv_heads != 0) {
    throw InvalidArgument(message("attention: ", shape.num_heads, " heads cannot share ",
                                  shape.num_kv_heads, " KV heads evenly"));
  }
  if (first_position.value + qkv.rows > kv.capacity) {
    throw InvalidArgument(message("attention: position ", first_position.value + qkv.rows - 1,
                                  " in a KV cache of ", kv.capacity, " tokens"));
  }
  check_activations(qkv, "attention");
  check_activations(out, "attention");
  check_activations({kv.keys, 1, shape.head_dim, kv.pitch}, "attention");
  check_activations({kv.values, 1, shape.head_dim, kv.pitch}, "attention");
  const AttentionArguments arguments{
      .q = qkv.data,
      .q_pitch = qkv.pitch,
      .keys = kv.keys,
      .values = kv.values,
      .capacity = kv.capacity,
      .kv_pitch = kv.pitch,
      .out = out.data,
      .out_pitch = out.pitch,
      .scratch = scratch,
      .first_position = first_position.value,
      .position_on_device = first_position.on_device,
      .window = params.window,
      .tokens = static_cast<unsigned>(qkv.rows),
      .num_heads = static_cast<unsigned>(shape.num_heads),
      .num_kv_heads = static_cast<unsigned>(shape.num_kv_heads),
      .head_dim = static_cast<unsigned>(shape.head_dim),
      .scale = params.scale,
  };
  if (qkv.rows > 1 && params.may_round) return launch_attention_prefill_tf32(stream, arguments);
  if (qkv.rows > 1) return launch_attention_prefill(stream, arguments);
  const std::size_t needed = attention_scratch_bytes(shape, 1, first_position.value + 1);
  if (scratch_bytes < needed) {
    throw InvalidArgument(message("attention: ", scratch_bytes, " bytes of scratch memory; ",
                                  needed, " are needed at position ", first_position.value));
  }
  launch_attention_decode(stream, arguments);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
