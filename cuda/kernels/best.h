// The largest of many scores, and where it is: of equals the one with the lower id.
#pragma once

#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kNone = ~0u;

struct Best {
  float score;
  unsigned id;
};

MOERUN_DEVICE Best better(const Best& a, const Best& b) {
  const bool first = a.score > b.score || (a.score == b.score && a.id < b.id);
  return first ? a : b;
}

// Every lane gets the best of all. No score may be a NaN.
MOERUN_DEVICE Best best_of_warp(Best best) {
  for (unsigned mask = kWarpSize / 2; mask != 0; mask /= 2) {
    best = better(best, {shuffle_xor(best.score, mask), shuffle_xor(best.id, mask)});
  }
  return best;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
