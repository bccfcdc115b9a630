// Random weights that every dtype holds exactly: multiples of 1/64 in [-1, 1].
#pragma once

#include <bit>
#include <cstdint>
#include <random>
#include <vector>

#include "base/dtype.h"
#include "base/view.h"

namespace moerun::test {

class RandomWeights {
 public:
  explicit RandomWeights(std::uint64_t seed) : random_(seed) {}

  float value() { return static_cast<float>(static_cast<int>(random_() % 129) - 64) / 64.0f; }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(random_() % n); }

  // (rows, padded(cols)) floats, the padding zero.
  std::vector<float> matrix(std::size_t rows, std::size_t cols) {
    std::vector<float> result(rows * padded(cols), 0.0f);
    for (std::size_t r = 0; r < rows; ++r) {
      for (std::size_t c = 0; c < cols; ++c) result[r * padded(cols) + c] = value();
    }
    return result;
  }

 private:
  std::mt19937_64 random_;
};

inline std::uint16_t exact_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if (x == 0) return 0;
  return static_cast<std::uint16_t>(
      ((bits >> 16) & 0x8000u) | ((((bits >> 23) & 0xffu) - 112) << 10) | ((bits >> 13) & 0x3ffu));
}

// The same values in `dtype`.
inline std::vector<std::byte> encode(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (dtype == DType::f32) {
      reinterpret_cast<float*>(bytes.data())[i] = values[i];
    } else {
      reinterpret_cast<std::uint16_t*>(bytes.data())[i] =
          dtype == DType::f16
              ? exact_half(values[i])
              : static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(values[i]) >> 16);
    }
  }
  return bytes;
}

inline constexpr DType kAllDTypes[] = {DType::f32, DType::f16, DType::bf16};

}  // namespace moerun::test
