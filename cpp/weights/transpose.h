// Transposition of a matrix of 2-byte or 4-byte elements.
#pragma once

#include <cstddef>

namespace moerun {

// target[c][r] = source[r][c]; strides in bytes from row to row.
void transpose(const std::byte* source, std::size_t source_stride, std::size_t rows,
               std::size_t cols, std::byte* target, std::size_t target_stride,
               std::size_t element_bytes);

}  // namespace moerun
