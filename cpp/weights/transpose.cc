#include "weights/transpose.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moerun {
namespace {

typedef std::uint16_t Row8 __attribute__((vector_size(16)));
typedef std::uint32_t Row4 __attribute__((vector_size(16)));

// Blocks are as wide and as high as a cache line, for both element sizes that are used.
constexpr std::size_t kLineBytes = 64;

// Eight rows of eight two-byte elements: interleave single elements, then pairs, then quadruples.
void transpose_tile(const std::byte* source, std::size_t source_stride, Row8 (&out)[8]) {
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
    out[2 * i] = __builtin_shufflevector(c[i], c[4 + i], 0, 1, 2, 3, 8, 9, 10, 11);
    out[2 * i + 1] = __builtin_shufflevector(c[i], c[4 + i], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Four rows of four four-byte elements.
void transpose_tile(const std::byte* source, std::size_t source_stride, Row4 (&out)[4]) {
  Row4 a[4];
  for (std::size_t r = 0; r < 4; ++r) std::memcpy(&a[r], source + r * source_stride, 16);
  const Row4 low01 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
  const Row4 high01 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
  const Row4 low23 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
  const Row4 high23 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// Past the caches where the processor can: a line is written whole, and not read again for long.
template <typename Row>
void store(std::byte* target, const Row& row, bool streams) {
#if defined(__SSE2__)
  if (streams) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target), reinterpret_cast<const __m128i&>(row));
    return;
  }
#endif
  static_cast<void>(streams);
  std::memcpy(target, &row, sizeof(Row));
}

// One line's height of rows, kWidth columns: every target row gets a whole line.
template <typename Row, int kWidth>
void transpose_lines(const std::byte* source, std::size_t source_stride, std::byte* target,
                     std::size_t target_stride, bool streams) {
  constexpr int kTiles = kLineBytes / sizeof(Row);
  Row tiles[kTiles][kWidth];
  for (int i = 0; i < kTiles; ++i) {
    transpose_tile(source + static_cast<std::size_t>(i * kWidth) * source_stride, source_stride,
                   tiles[i]);
  }
  for (int c = 0; c < kWidth; ++c) {
    for (int i = 0; i < kTiles; ++i) {
      store(target + static_cast<std::size_t>(c) * target_stride +
                static_cast<std::size_t>(i) * sizeof(Row),
            tiles[i][c], streams);
    }
  }
}

// The rows and columns that fill whole lines. Blocks of a line by a line: every source line is used
// up while it is in cache.
template <typename Row, int kWidth>
void transpose_whole_lines(const std::byte* source, std::size_t source_stride, std::size_t rows,
                           std::size_t cols, std::byte* target, std::size_t target_stride) {
  constexpr std::size_t kElementBytes = sizeof(Row) / kWidth;
  constexpr std::size_t kBlock = kLineBytes / kElementBytes;
  const bool streams = (reinterpret_cast<std::uintptr_t>(target) | target_stride) % 16 == 0;
  for (std::size_t first = 0; first < cols; first += kBlock) {
    for (std::size_t r = 0; r < rows; r += kBlock) {
      for (std::size_t c = first; c < first + kBlock; c += kWidth) {
        transpose_lines<Row, kWidth>(source + r * source_stride + c * kElementBytes, source_stride,
                                     target + c * target_stride + r * kElementBytes, target_stride,
                                     streams);
      }
    }
  }
#if defined(__SSE2__)
  _mm_sfence();  // other threads will read what was streamed
#endif
}

}  // namespace

void transpose(const std::byte* source, std::size_t source_stride, std::size_t rows,
               std::size_t cols, std::byte* target, std::size_t target_stride,
               std::size_t element_bytes) {
  const std::size_t block = kLineBytes / element_bytes;
  const std::size_t whole_rows = rows / block * block;
  const std::size_t whole_cols = cols / block * block;
  if (element_bytes == 2) {
    transpose_whole_lines<Row8, 8>(source, source_stride, whole_rows, whole_cols, target,
                                   target_stride);
  } else {
    transpose_whole_lines<Row4, 4>(source, source_stride, whole_rows, whole_cols, target,
                                   target_stride);
  }
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t c = r < whole_rows ? whole_cols : 0; c < cols; ++c) {
      std::memcpy(target + c * target_stride + r * element_bytes,
                  source + r * source_stride + c * element_bytes, element_bytes);
    }
  }
}

}  // namespace moerun
