#include "kernels/attention.h"

#include <algorithm>

#include "kernels/attention_kernels.h"
#include "kernels/dtype_dispatch.h"
#include "kernels/sequence_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

AttentionArguments arguments_of(const AttentionShape& shape, const AttentionParams& params,
                                Position first_position, std::size_t tokens, const Activations& qkv,
                                const KvLayer& kv, const Activations& out, float* scratch) {
  if (shape.head_dim > kMaxHeadDim || shape.head_dim % 4 != 0) {
    throw InvalidArgument(message("attention: heads of ", shape.head_dim,
                                  "; the CUDA kernels take multiples of 4 up to ", kMaxHeadDim));
  }
  if (shape.num_kv_heads == 0 || shape.num_heads % shape.num_kv_heads != 0) {
    throw InvalidArgument(message("attention: ", shape.num_heads, " heads cannot share ",
                                  shape.num_kv_heads, " KV heads evenly"));
  }
  if (first_position.value + tokens > kv.capacity) {
    throw InvalidArgument(message("attention: position ", first_position.value + tokens - 1,
                                  " in a KV cache of ", kv.capacity, " tokens"));
  }
  check_activations(qkv, "attention");
  check_activations(out, "attention");
  check_activations({kv.keys, 1, shape.head_dim, kv.pitch}, "attention");
  check_activations({kv.values, 1, shape.head_dim, kv.pitch}, "attention");
  return {
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
      .tokens = static_cast<unsigned>(tokens),
      .num_heads = static_cast<unsigned>(shape.num_heads),
      .num_kv_heads = static_cast<unsigned>(shape.num_kv_heads),
      .head_dim = static_cast<unsigned>(shape.head_dim),
      .scale = params.scale,
  };
}

void check_scratch(std::size_t scratch_bytes, std::size_t needed, std::size_t position) {
  if (scratch_bytes >= needed) return;
  throw InvalidArgument(message("attention: ", scratch_bytes, " bytes of scratch memory; ", needed,
                                " are needed at position ", position));
}

}  // namespace

std::size_t attention_scratch_bytes(const AttentionShape& shape, std::size_t max_tokens,
                                    std::size_t capacity) {
  if (max_tokens == 0) return 0;
  return decode_scratch_floats(shape.num_heads, shape.head_dim, capacity) * sizeof(float);
}

void attention(StreamHandle stream, const AttentionShape& shape, const AttentionParams& params,
               Position first_position, Activations qkv, const KvLayer& kv, Activations out,
               float* scratch, std::size_t scratch_bytes) {
  if (qkv.rows == 0) return;
  const AttentionArguments arguments =
      arguments_of(shape, params, first_position, qkv.rows, qkv, kv, out, scratch);
  if (qkv.rows > 1 && params.may_round) return launch_attention_prefill_tf32(stream, arguments);
  if (qkv.rows > 1) return launch_attention_prefill(stream, arguments);
  check_scratch(scratch_bytes, attention_scratch_bytes(shape, 1, first_position.value + 1),
                first_position.value);
  launch_attention_decode(stream, arguments);
}

void attention_each(StreamHandle stream, const AttentionShape& shape, const AttentionParams& params,
                    std::span<const SequenceRows> sequences, Activations qkv, Activations out,
                    float* scratch, std::size_t scratch_bytes) {
  if (sequences.empty()) return;
  check_list(sequences, qkv, "attention");
  AttentionArguments arguments{};
  std::size_t last = 0;
  for (const SequenceRows& each : sequences) {
    arguments = arguments_of(shape, params, each.first_position, 1, qkv, each.kv, out, scratch);
    last = std::max(last, each.first_position);
  }
  check_scratch(scratch_bytes, attention_each_scratch_bytes(shape, sequences.size(), last + 1),
                last);
  launch_attention_decode_each(stream, arguments, sequences);
}

std::size_t attention_each_scratch_bytes(const AttentionShape& shape, std::size_t num_sequences,
                                         std::size_t capacity) {
  return num_sequences * attention_scratch_bytes(shape, 1, capacity);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
