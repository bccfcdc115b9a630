// What every kernel of linear() is given; linear.cu chooses among them.
#pragma once

#include <cstddef>

#include "kernels/launch.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

struct ProductArguments {
  const std::byte* weight;  // (rows, cols)
  std::size_t row_bytes;
  const float* bias;  // (rows)?
  const float* x;     // (tokens, cols)
  std::size_t x_pitch;
  float* y;  // (tokens, rows)
  std::size_t y_pitch;
  unsigned rows;
  unsigned cols;
  unsigned tokens;
  float scale;
  bool accumulate;
};

struct Place {
  unsigned token;
  unsigned row;
};

// From W x to y, for kCount numbers of a thread: value(i), a reference, and their place(i). Reads
// all that it needs before it writes: a thread would else wait for memory kCount times.
template <unsigned kCount, typename Value, typename PlaceOf>
MOERUN_DEVICE void write_products(const ProductArguments& a, const Value& value,
                                  const PlaceOf& place) {
  const auto is_inside = [&](Place at) { return at.token < a.tokens && at.row < a.rows; };
  if (a.bias != nullptr) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kCount; ++i) {
      if (is_inside(place(i))) value(i) += a.bias[place(i).row];
    }
  }
  MOERUN_UNROLL
  for (unsigned i = 0; i < kCount; ++i) value(i) *= a.scale;
  if (a.accumulate) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kCount; ++i) {
      if (is_inside(place(i))) value(i) += a.y[place(i).token * a.y_pitch + place(i).row];
    }
  }
  MOERUN_UNROLL
  for (unsigned i = 0; i < kCount; ++i) {
    if (is_inside(place(i))) a.y[place(i).token * a.y_pitch + place(i).row] = value(i);
  }
}

// Up to kFewTokens tokens, any dtype.
void launch_gemv(StreamHandle stream, DType dtype, const ProductArguments& arguments);
// In float32, any dtype.
void launch_gemm(StreamHandle stream, DType dtype, const ProductArguments& arguments);
// bf16 or F16 weights on tensor cores.
void launch_gemm_half(StreamHandle stream, DType dtype, const ProductArguments& arguments);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
