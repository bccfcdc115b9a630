// mma.sync on the host.
#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

struct Fragments {
  std::uint32_t a[4];
  std::uint32_t b[2];
};

float half_of(std::uint32_t pair, unsigned index) {
  return bf16_to_float(static_cast<std::uint16_t>(pair >> (16 * index)));
}

Fragments fragments_of(const std::byte* all, unsigned lane) {
  Fragments fragments;
  std::memcpy(&fragments, all + lane * cuda_host::kExchangeBytes, sizeof(fragments));
  return fragments;
}

// Numbers of the whole tiles, from whichever lane holds them.
float a_at(const std::byte* all, unsigned row, unsigned col) {
  const unsigned owner = row % 8 * 4 + col % 8 / 2;
  return half_of(fragments_of(all, owner).a[row / 8 + col / 8 * 2], col % 2);
}
float b_at(const std::byte* all, unsigned row, unsigned col) {
  const unsigned owner = col * 4 + row % 8 / 2;
  return half_of(fragments_of(all, owner).b[row / 8], row % 2);
}

}  // namespace

void multiply_tiles_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const std::byte* all = cuda_host::exchange(cuda_host::WarpOperation::matrix, &own, sizeof(own));
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8;
    const unsigned col = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) d[i] += a_at(all, row, k) * b_at(all, k, col);
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
