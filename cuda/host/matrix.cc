// mma.sync on the host.
#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

struct Fragments {
  std::uint32_t a[4];
  std::uint32_t b[2];
};

// Numbers of the whole tiles, from whichever lane holds them.
class Tiles {
 public:
  Tiles(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    all_ = cuda_host::exchange(cuda_host::WarpOperation::matrix, &own, sizeof(own));
  }
  Fragments of_lane(unsigned lane) const {
    Fragments fragments;
    std::memcpy(&fragments, all_ + lane * cuda_host::kExchangeBytes, sizeof(fragments));
    return fragments;
  }

 private:
  const std::byte* all_;
};

struct Bf16Tiles : Tiles {
  static constexpr unsigned kProducts = 16;
  using Tiles::Tiles;
  float a_at(unsigned row, unsigned col) const {
    const unsigned owner = row % 8 * 4 + col % 8 / 2;
    return half_of(of_lane(owner).a[row / 8 + col / 8 * 2], col % 2);
  }
  float b_at(unsigned row, unsigned col) const {
    const unsigned owner = col * 4 + row % 8 / 2;
    return half_of(of_lane(owner).b[row / 8], row % 2);
  }
  static float half_of(std::uint32_t pair, unsigned index) {
    return bf16_to_float(static_cast<std::uint16_t>(pair >> (16 * index)));
  }
};

struct Tf32Tiles : Tiles {
  static constexpr unsigned kProducts = 8;
  using Tiles::Tiles;
  float a_at(unsigned row, unsigned col) const {
    return cut(of_lane(row % 8 * 4 + col % 4).a[row / 8 + col / 4 * 2]);
  }
  float b_at(unsigned row, unsigned col) const {
    return cut(of_lane(col * 4 + row % 4).b[row / 4]);
  }
  // Of a number that nobody rounded, the lower bits are lost.
  static float cut(std::uint32_t bits) { return float_of(bits & 0xffffe000u); }
};

template <typename Tiles>
void multiply(float (&d)[4], const Tiles& tiles) {
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8;
    const unsigned col = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < Tiles::kProducts; ++k) d[i] += tiles.a_at(row, k) * tiles.b_at(k, col);
  }
}

}  // namespace

void multiply_tiles_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply(d, Bf16Tiles(a, b));
}

void multiply_tiles_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply(d, Tf32Tiles(a, b));
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
