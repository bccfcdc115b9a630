// Dot products of rows of weights with rows of activations, spread over a warp.
#pragma once

#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// sums[r][t] = the lane's share of rows[r] . xs[t]: lane l multiplies packs l, l + 32, ... of 16
// bytes of weights, element after element, and adds in that order. So a sum has the same bits
// whichever rows and tokens are computed beside it. Weights are read once.
template <DType kDType, unsigned kRows, unsigned kTokens>
MOERUN_DEVICE void dot_rows(const std::byte* const (&rows)[kRows],
                            const float* const (&xs)[kTokens], unsigned cols,
                            float (&sums)[kRows][kTokens]) {
  constexpr unsigned kWidth = kPackWeights<kDType>;
  // Packs of a lane that are under way at once, in all rows: 64 to 128 bytes. With 16 or more warps
  // on a multiprocessor that is twice what the memory of an H100 needs.
  constexpr unsigned kAhead = kRows == 1 ? 4 : 8 / kRows;
  MOERUN_UNROLL
  for (unsigned r = 0; r < kRows; ++r) {
    MOERUN_UNROLL
    for (unsigned t = 0; t < kTokens; ++t) sums[r][t] = 0;
  }
  const unsigned num_packs = (cols + kWidth - 1) / kWidth;
  for (unsigned base = lane(); base < num_packs; base += kAhead * kWarpSize) {
    Pack16 packs[kAhead][kRows];
    MOERUN_UNROLL
    for (unsigned j = 0; j < kAhead; ++j) {
      // Behind the row's end its last pack again, which nothing uses.
      const unsigned p = base + j * kWarpSize < num_packs ? base + j * kWarpSize : num_packs - 1;
      MOERUN_UNROLL
      for (unsigned r = 0; r < kRows; ++r) {
        packs[j][r] = load_once(rows[r] + std::size_t{p} * sizeof(Pack16));
      }
    }
    MOERUN_UNROLL
    for (unsigned j = 0; j < kAhead; ++j) {
      const unsigned first_col = (base + j * kWarpSize) * kWidth;
      if (first_col >= cols) break;
      MOERUN_UNROLL
      for (unsigned quarter = 0; quarter < kWidth; quarter += 4) {
        MOERUN_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) {
          const Float4 x = load4_within(xs[t], first_col + quarter, cols);
          MOERUN_UNROLL
          for (unsigned i = 0; i < 4; ++i) {
            MOERUN_UNROLL
            for (unsigned r = 0; r < kRows; ++r) {
              const float w = weight_at<kDType>(packs[j][r], quarter + i);
              sums[r][t] = fused_multiply_add(w, x.at[i], sums[r][t]);
            }
          }
        }
      }
    }
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
