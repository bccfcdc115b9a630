// A warp's share of a matrix product on tensor cores: 64 rows of weights times 32 tokens, with
// float32 sums. For weights of 16 bits that go straight from memory to registers: bf16 is
// multiplied in bf16; F16 in tf32, which holds it exactly and tokens of any size (see
// gemm_half.cu).
//
// The 32 products of a step are dealt out so that every lane loads whole 16-byte packs: lane
// (g, t) = (lane / 4, lane % 4) takes numbers 8t..8t+7 of a token's 32, and of the weights too.
// The tensor core thinks of them as 2t, 2t+1, 2t+8, 2t+9 of two products of 16, which is all the
// same to a sum as long as both factors are dealt out alike. In tf32 they are t and t + 4 of four
// products of 8.
#pragma once

#include <type_traits>

#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kRowTiles = 4;    // of 16 rows
inline constexpr unsigned kTokenTiles = 4;  // of 8 tokens
inline constexpr unsigned kTileTokens = kTokenTiles * 8;
inline constexpr unsigned kStep = 32;  // products of a step
inline constexpr unsigned kPacks = 8;  // 16-byte packs of weights that a lane loads for a step

struct TileSums {
  // d[row][tokens][0..3]: rows g, g, g + 8, g + 8 and tokens 2t, 2t + 1, 2t, 2t + 1 of a tile.
  float d[kRowTiles][kTokenTiles][4];

  MOERUN_DEVICE void clear() {
    MOERUN_UNROLL
    for (unsigned m = 0; m < kRowTiles; ++m) {
      MOERUN_UNROLL
      for (unsigned n = 0; n < kTokenTiles; ++n) {
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) d[m][n][i] = 0;
      }
    }
  }
};

// What a lane holds of the weights of a step: (row tiles, halves of the step, registers).
struct TileWeights {
  std::uint32_t a[kRowTiles][2][4];
};

// What tokens are multiplied as, for weights of a dtype: bf16, or tf32 in a float.
template <DType kDType>
using TokenNumber = std::conditional_t<kDType == DType::bf16, std::uint16_t, float>;

// The tokens of a tile, rows of numbers. A lane loads those of tokens g, g + 8, ...
template <DType kDType>
struct TileTokens {
  const TokenNumber<kDType>* rows[kTokenTiles];  // null: no such token
  unsigned num_tiles;                            // that have any token; the same in all lanes
};

MOERUN_DEVICE void multiply_step(TileSums& sums, const TileWeights& weights,
                                 const TileTokens<DType::bf16>& tokens, std::size_t offset) {
  const std::size_t own = offset + lane() % 4 * 8;
  MOERUN_UNROLL
  for (unsigned n = 0; n < kTokenTiles; ++n) {
    if (n >= tokens.num_tiles) break;
    Pack16 pack = {};
    if (tokens.rows[n] != nullptr) pack = *reinterpret_cast<const Pack16*>(tokens.rows[n] + own);
    MOERUN_UNROLL
    for (unsigned half = 0; half < 2; ++half) {
      const std::uint32_t b[2] = {pack.words[2 * half], pack.words[2 * half + 1]};
      MOERUN_UNROLL
      for (unsigned m = 0; m < kRowTiles; ++m) {
        multiply_tiles_bf16(sums.d[m][n], weights.a[m][half], b);
      }
    }
  }
}

MOERUN_DEVICE void multiply_step(TileSums& sums, const TileWeights& weights,
                                 const TileTokens<DType::f16>& tokens, std::size_t offset) {
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    const std::size_t own = offset + lane() % 4 * 8 + half * 4;
    Pack16 packs[kTokenTiles] = {};
    MOERUN_UNROLL
    for (unsigned n = 0; n < kTokenTiles; ++n) {
      if (tokens.rows[n] != nullptr) {
        packs[n] = *reinterpret_cast<const Pack16*>(tokens.rows[n] + own);
      }
    }
    MOERUN_UNROLL
    for (unsigned m = 0; m < kRowTiles; ++m) {
      const std::uint32_t (&pairs)[4] = weights.a[m][half];
      MOERUN_UNROLL
      for (unsigned product = 0; product < 2; ++product) {
        const std::uint32_t top = pairs[2 * product];
        const std::uint32_t bottom = pairs[2 * product + 1];
        const std::uint32_t a[4] = {bits_of(low_f16(top)), bits_of(low_f16(bottom)),
                                    bits_of(high_f16(top)), bits_of(high_f16(bottom))};
        MOERUN_UNROLL
        for (unsigned n = 0; n < kTokenTiles; ++n) {
          if (n >= tokens.num_tiles) break;
          const std::uint32_t b[2] = {packs[n].words[2 * product], packs[n].words[2 * product + 1]};
          multiply_tiles_tf32(sums.d[m][n], a, b);
        }
      }
    }
  }
}

// Of weights whose rows run along the products: packs 2m and 2m + 1 are of rows g and g + 8 of
// tile m.
MOERUN_DEVICE TileWeights weights_along(const Pack16 (&packs)[kPacks]) {
  TileWeights weights;
  MOERUN_UNROLL
  for (unsigned m = 0; m < kRowTiles; ++m) {
    MOERUN_UNROLL
    for (unsigned half = 0; half < 2; ++half) {
      weights.a[m][half][0] = packs[2 * m].words[2 * half];
      weights.a[m][half][1] = packs[2 * m + 1].words[2 * half];
      weights.a[m][half][2] = packs[2 * m].words[2 * half + 1];
      weights.a[m][half][3] = packs[2 * m + 1].words[2 * half + 1];
    }
  }
  return weights;
}

// Of weights whose rows run across: pack j is of product 8t + j, and holds 8 rows, of which 2m and
// 2m + 1 become rows g and g + 8 of tile m.
MOERUN_DEVICE TileWeights weights_across(const Pack16 (&packs)[kPacks]) {
  TileWeights weights;
  MOERUN_UNROLL
  for (unsigned m = 0; m < kRowTiles; ++m) {
    MOERUN_UNROLL
    for (unsigned half = 0; half < 2; ++half) {
      MOERUN_UNROLL
      for (unsigned pair = 0; pair < 2; ++pair) {
        const std::uint32_t first = packs[4 * half + 2 * pair].words[m];
        const std::uint32_t second = packs[4 * half + 2 * pair + 1].words[m];
        weights.a[m][half][2 * pair] = (first & 0xffffu) | (second << 16);
        weights.a[m][half][2 * pair + 1] = (first >> 16) | (second & 0xffff0000u);
      }
    }
  }
  return weights;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
