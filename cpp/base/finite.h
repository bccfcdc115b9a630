// NaN and infinity: finds them, and keeps them visible.
#pragma once

#include <bit>
#include <cstdint>
#include <span>

namespace moerun {

// Compilers turn it into a few vector instructions, which a loop that stops early would not be.
inline bool all_finite(std::span<const float> values) {
  constexpr std::uint32_t kExponent = 0x7f800000u;
  std::uint32_t found = 0;
  for (const float value : values) {
    found |= (std::bit_cast<std::uint32_t>(value) & kExponent) == kExponent ? 1u : 0u;
  }
  return found == 0;
}

// A finite number bit by bit, anything else as NaN: for what a limit or an exponential would turn
// back into an ordinary number.
inline float nan_unless_finite(float x) { return x * 0.0f + x; }

}  // namespace moerun
