// Few tokens: memory is what takes the time, so every weight is read once for all of them.
#include "kernels/dot.h"
#include "kernels/dtype_dispatch.h"
#include "kernels/linear.h"
#include "kernels/product.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

// A warp reads several rows for several tokens, so that activations, twice as large as bf16 weights
// and read from the first-level cache by every warp, do not take longer than the weights: an H100
// delivers some 15 bytes of weights a clock to a multiprocessor, and its cache 64 of activations in
// this pattern.
template <unsigned kTokens>
constexpr unsigned kRowsPerWarp = kTokens < 4 ? kTokens : 4;

// With fewer rows than this, more and smaller blocks spread over more multiprocessors.
constexpr unsigned kManyRows = 1024;

// A block computes kRowsPerWarp * num_warps() rows of y for all tokens; a warp some rows, its
// lanes sharing each dot product; afterwards lane r * kTokens + t holds y[t][r].
// Preconditions: tokens <= kTokens; rows of weights and activations on 16-byte borders.
template <DType kDType, unsigned kTokens>
MOERUN_KERNEL gemv_kernel(ProductArguments a) {
  constexpr unsigned kRows = kRowsPerWarp<kTokens>;
  const unsigned first_row = (block_x() * num_warps() + warp()) * kRows;
  if (first_row >= a.rows) return;
  const std::byte* rows[kRows];
  const float* xs[kTokens];
  MOERUN_UNROLL
  for (unsigned r = 0; r < kRows; ++r) {
    const unsigned row = first_row + r < a.rows ? first_row + r : a.rows - 1;
    rows[r] = a.weight + row * a.row_bytes;
  }
  MOERUN_UNROLL
  for (unsigned t = 0; t < kTokens; ++t) {
    xs[t] = a.x + (t < a.tokens ? t : a.tokens - 1) * a.x_pitch;
  }
  float sums[kRows][kTokens];
  dot_rows<kDType>(rows, xs, a.cols, sums);
  float own[1] = {};
  MOERUN_UNROLL
  for (unsigned r = 0; r < kRows; ++r) {
    MOERUN_UNROLL
    for (unsigned t = 0; t < kTokens; ++t) {
      const float sum = sum_over_warp(sums[r][t]);
      if (lane() == r * kTokens + t) own[0] = sum;
    }
  }
  if (lane() >= kRows * kTokens) return;
  write_products<1>(
      a, [&](unsigned i) -> float& { return own[i]; },
      [&](unsigned) { return Place{lane() % kTokens, first_row + lane() / kTokens}; });
}

template <DType kDType, unsigned kTokens>
void launch_tokens(StreamHandle stream, const ProductArguments& arguments) {
  const unsigned warps = arguments.rows >= kManyRows ? 4 : 1;
  const unsigned rows = warps * kRowsPerWarp<kTokens>;
  launch<gemv_kernel<kDType, kTokens>>(
      stream, {(arguments.rows + rows - 1) / rows, 1, 1, warps * kWarpSize}, arguments, "gemv");
}

}  // namespace

void launch_gemv(StreamHandle stream, DType dtype, const ProductArguments& arguments) {
  dispatch_dtype(dtype, [&](auto constant) {
    constexpr DType kDType = constant.value;
    if (arguments.tokens == 1) return launch_tokens<kDType, 1>(stream, arguments);
    if (arguments.tokens == 2) return launch_tokens<kDType, 2>(stream, arguments);
    if (arguments.tokens <= 4) return launch_tokens<kDType, 4>(stream, arguments);
    return launch_tokens<kDType, kFewTokens>(stream, arguments);
  });
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
