// Sixteen bytes of weights or of activations, as numbers.
#pragma once

#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Four neighbours of a row of activations.
struct alignas(16) Float4 {
  float at[4];
};

MOERUN_DEVICE Float4 load4(const float* address) {
  return *reinterpret_cast<const Float4*>(address);
}
MOERUN_DEVICE void store4(float* address, const Float4& value) {
  *reinterpret_cast<Float4*>(address) = value;
}

struct alignas(8) Float2 {
  float at[2];
};
MOERUN_DEVICE Float2 load2(const float* address) {
  return *reinterpret_cast<const Float2*>(address);
}

// Those at `first_col` of a row of `cols`; what lies behind the row's end counts as zero, whatever
// memory holds there.
MOERUN_DEVICE Float4 load4_within(const float* row, unsigned first_col, unsigned cols) {
  if (first_col + 4 <= cols) return load4(row + first_col);
  Float4 value;
  MOERUN_UNROLL
  for (unsigned i = 0; i < 4; ++i) value.at[i] = first_col + i < cols ? row[first_col + i] : 0.0f;
  return value;
}

// Of a word of two F16 numbers.
MOERUN_DEVICE float low_f16(std::uint32_t pair) {
  return to_float_f16(static_cast<std::uint16_t>(pair));
}
MOERUN_DEVICE float high_f16(std::uint32_t pair) { return low_f16(pair >> 16); }

// Weights that one thread loads at once.
template <DType kDType>
inline constexpr unsigned kPackWeights = kDType == DType::f32 ? 4 : 8;

template <DType kDType>
MOERUN_DEVICE float weight_at(const Pack16& pack, unsigned i) {
  if constexpr (kDType == DType::f32) {
    return float_of(pack.words[i]);
  } else if constexpr (kDType == DType::bf16) {
    return float_of(i % 2 == 0 ? pack.words[i / 2] << 16 : pack.words[i / 2] & 0xffff0000u);
  } else {
    return i % 2 == 0 ? low_f16(pack.words[i / 2]) : high_f16(pack.words[i / 2]);
  }
}

// Every thread of the block gets the sum: of a warp in the order of sum_over_warp, of warps in
// their order. `warp_sums` is shared memory for one float a warp; it may be used again after the
// next barrier.
MOERUN_DEVICE float sum_over_block(float value, float* warp_sums) {
  value = sum_over_warp(value);
  if (lane() == 0) warp_sums[warp()] = value;
  sync_block();
  float total = 0;
  for (unsigned w = 0; w < num_warps(); ++w) total += warp_sums[w];
  return total;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
