#include "weights/transpose.h"

#include <cstdint>
#include <cstring>

namespace moerun {
namespace {

typedef std::uint16_t Row8 __attribute__((vector_size(16)));
typedef std::uint32_t Row4 __attribute__((vector_size(16)));

// Eight rows of eight: interleave single elements, then pairs, then quadruples.
void transpose_8x8(const std::byte* source, std::size_t source_stride, std::byte* target,
                   std::size_t target_stride) {
  Row8 a[8];
  for (std::size_t r = 0; r < 8; ++r) std::memcpy(&a[r], source + r * source_stride, 16);
  Row8 b[8];
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
    b[2 * i + 1] = __builtin_shufflevector(a[2 * i], a[2 * i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  Row8 c[8];
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      const Row8 x = b[4 * half + i];
      const Row8 y = b[4 * half + 2 + i];
      c[4 * half + 2 * i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 2, 3, 10, 11);
      c[4 * half + 2 * i + 1] = __builtin_shufflevector(x, y, 4, 5, 12, 13, 6, 7, 14, 15);
    }
  }
  for (std::size_t i = 0; i < 4; ++i) {
    const Row8 low = __builtin_shufflevector(c[i], c[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
    const Row8 high = __builtin_shufflevector(c[i], c[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
    std::memcpy(target + 2 * i * target_stride, &low, 16);
    std::memcpy(target + (2 * i + 1) * target_stride, &high, 16);
  }
}

void transpose_4x4(const std::byte* source, std::size_t source_stride, std::byte* target,
                   std::size_t target_stride) {
  Row4 a[4];
  for (std::size_t r = 0; r < 4; ++r) std::memcpy(&a[r], source + r * source_stride, 16);
  const Row4 low01 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
  const Row4 high01 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const Row4 low23 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
  const Row4 high23 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  const Row4 out[4] = {__builtin_shufflevector(low01, low23, 0, 1, 4, 5),
                       __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
                       __builtin_shufflevector(high01, high23, 0, 1, 4, 5),
                       __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
  for (std::size_t r = 0; r < 4; ++r) std::memcpy(target + r * target_stride, &out[r], 16);
}

}  // namespace

void transpose(const std::byte* source, std::size_t source_stride, std::size_t rows,
               std::size_t cols, std::byte* target, std::size_t target_stride,
               std::size_t element_bytes) {
  const std::size_t step = 16 / element_bytes;
  const auto tile = element_bytes == 2 ? transpose_8x8 : transpose_4x4;
  const std::size_t whole_rows = rows / step * step;
  const std::size_t whole_cols = cols / step * step;
  // Down a strip of columns, a tile at a time: writes fill whole cache lines of few target rows.
  for (std::size_t c = 0; c < whole_cols; c += step) {
    for (std::size_t r = 0; r < whole_rows; r += step) {
      tile(source + r * source_stride + c * element_bytes, source_stride,
           target + c * target_stride + r * element_bytes, target_stride);
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) {
      std::memcpy(target + c * target_stride + r * element_bytes,
                  source + r * source_stride + c * element_bytes, element_bytes);
    }
  }
}

}  // namespace moerun
