#include "kernels/attention_splits.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

// A block adds the splits of one head in their order; a thread takes every num_threads()-th column.
// Shared memory: a factor and a weighted sum for each split.
// Preconditions: at most kMaxSplits splits.
template <typename Arguments>
MOERUN_KERNEL combine_kernel(const MOERUN_IN_PLACE Arguments arguments) {
  const AttentionArguments a = own_arguments(arguments);
  const unsigned count = splits_of(a).count;
  if (count == 1) return;  // the block that computed it wrote the result
  auto* factors = shared_memory<float>();
  float* sums = factors + kMaxSplits;
  const std::size_t pitch = a.head_dim + kPartialExtra;
  const float* partials = a.scratch + std::size_t{block_x()} * count * pitch;
  float largest = -INFINITY;
  for (unsigned s = lane(); s < count; s += kWarpSize) {
    largest = fmaxf(largest, partials[s * pitch + a.head_dim]);
  }
  largest = max_over_warp(largest);
  for (unsigned s = thread_x(); s < count; s += num_threads()) {
    factors[s] = expf(partials[s * pitch + a.head_dim] - largest);
    sums[s] = factors[s] * partials[s * pitch + a.head_dim + 1];
  }
  sync_block();
  float total = 0;
  for (unsigned s = 0; s < count; ++s) total += sums[s];
  for (unsigned d = thread_x(); d < a.head_dim; d += num_threads()) {
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned s = 0; s < count; ++s) {
      sum = fused_multiply_add(factors[s], partials[s * pitch + d], sum);
    }
    a.out[block_x() * a.head_dim + d] = sum / total;
  }
}

template <typename Arguments>
void launch_combine(StreamHandle stream, const Arguments& arguments, std::size_t num_sequences) {
  const AttentionArguments& a = arguments.all;
  const unsigned threads = (a.head_dim + kWarpSize - 1) / kWarpSize * kWarpSize;
  launch<combine_kernel<Arguments>>(stream,
                                    {a.num_heads, 1, static_cast<unsigned>(num_sequences), threads,
                                     2 * kMaxSplits * sizeof(float)},
                                    arguments, "attention_combine");
}

}  // namespace

void launch_attention_combine(StreamHandle stream, const DecodeArguments& arguments) {
  launch_combine(stream, arguments, 1);
}

void launch_attention_combine(StreamHandle stream, const DecodeEachArguments& arguments,
                              std::size_t num_sequences) {
  launch_combine(stream, arguments, num_sequences);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
