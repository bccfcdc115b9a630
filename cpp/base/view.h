// Views: a pointer never travels without its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/dtype.h"

namespace moerun {

using ConstBytes = std::span<const std::byte>;
using Bytes = std::span<std::byte>;

// Rows are padded so that every row starts on a 64-byte border and kernels need no tail code:
// a row of `n` elements takes `padded(n)` of them, the excess being zero.
inline constexpr std::size_t kRowQuantum = 32;
constexpr std::size_t padded(std::size_t n) {
  return (n + kRowQuantum - 1) / kRowQuantum * kRowQuantum;
}

// A matrix of weights in some dtype: (rows, cols) with `pitch` elements from row to row.
struct MatrixView {
  const std::byte* data = nullptr;
  DType dtype = DType::f32;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t pitch = 0;  // elements, >= cols

  std::size_t row_bytes() const { return pitch * size_of(dtype); }
  std::size_t bytes() const { return rows * row_bytes(); }
  const std::byte* row(std::size_t r) const { return data + r * row_bytes(); }
  bool empty() const { return data == nullptr; }
};

// Activations: float32, (rows, cols) with `pitch` elements from row to row; a row is a token.
struct Activations {
  float* data = nullptr;
  std::size_t rows = 0;
  std::size_t cols = 0;
  std::size_t pitch = 0;  // elements, >= cols

  float* row(std::size_t r) const { return data + r * pitch; }
  Activations slice(std::size_t first, std::size_t count) const {
    return {row(first), count, cols, pitch};
  }
};

}  // namespace moerun
