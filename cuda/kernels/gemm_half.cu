// Many tokens with weights of 16 bits on tensor cores.
//
// bf16 weights are multiplied in bf16, and activations rounded to that. F16 weights are multiplied
// in tf32, which holds them exactly: activations in f16 would be infinite above 65504, and rows
// scaled to fit would take another pass over them. That is half the tensor cores' speed, and more
// exact.
#include "kernels/product.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kTileCols = 32;  // rows of weights are padded to a multiple of it
// Sixteen bytes more than 32 weights need, and 32 more than 32 activations: what a warp reads as a
// fragment lies in different banks.
constexpr unsigned kWeightPitch = kTileCols / 2 + 4;  // words of two weights
constexpr unsigned kInputPitch = kTileCols + 8;       // floats

// How a block's part of y is shared out. All tiles add up the columns in the same order.
template <unsigned kTokens_, unsigned kRows_, unsigned kWarpsAlongTokens_,
          unsigned kWarpsAlongRows_, unsigned kStages_, unsigned kBlocks_>
struct Tile {
  static constexpr unsigned kTokens = kTokens_;
  static constexpr unsigned kRows = kRows_;
  static constexpr unsigned kWarpsAlongRows = kWarpsAlongRows_;
  static constexpr unsigned kStages = kStages_;  // buffers: all but one are being filled
  static constexpr unsigned kBlocks = kBlocks_;  // that are to fit on a multiprocessor
  static constexpr unsigned kThreads = kWarpsAlongTokens_ * kWarpsAlongRows_ * kWarpSize;
  static constexpr unsigned kWarpTokens = kTokens / kWarpsAlongTokens_;
  static constexpr unsigned kWarpRows = kRows / kWarpsAlongRows_;
  static constexpr unsigned kFragmentsOfTokens = kWarpTokens / 16;
  static constexpr unsigned kFragmentsOfRows = kWarpRows / 8;
  static constexpr unsigned kStageWords = kTokens * kInputPitch + kRows * kWeightPitch;
  static constexpr std::size_t kSharedBytes = std::size_t{kStages} * kStageWords * 4;
};
// Compute-bound; two blocks fill the registers of a multiprocessor.
using LargeTile = Tile<128, 128, 4, 2, 2, 2>;
// For enough blocks where the large one would leave multiprocessors idle.
using MiddleTile = Tile<64, 64, 2, 2, 3, 4>;
// Memory-bound: many blocks, and many bytes on their way.
using SmallTile = Tile<32, 32, 2, 2, 4, 8>;

// About the multiprocessors of an A100 or H100; results do not depend on it.
constexpr unsigned kEnoughBlocks = 128;

// Begins to fill one buffer with the columns from first_col on.
template <typename Tile>
MOERUN_DEVICE void load_stage(const ProductArguments& a, unsigned first_token, unsigned first_row,
                              unsigned first_col, float* inputs, std::uint32_t* weights) {
  constexpr unsigned kPacks = kTileCols / 8;
  for (unsigned item = thread_x(); item < Tile::kRows * kPacks; item += Tile::kThreads) {
    const unsigned row = first_row + item / kPacks;
    copy_later(weights + item / kPacks * kWeightPitch + item % kPacks * 4,
               a.weight + (row < a.rows ? row : a.rows - 1) * a.row_bytes +
                   (first_col / 8 + item % kPacks) * sizeof(Pack16));
  }
  constexpr unsigned kQuads = kTileCols / 4;
  for (unsigned item = thread_x(); item < Tile::kTokens * kQuads; item += Tile::kThreads) {
    const unsigned token = first_token + item / kQuads;
    const float* row = a.x + (token < a.tokens ? token : a.tokens - 1) * a.x_pitch;
    const unsigned col = first_col + item % kQuads * 4;
    float* target = inputs + item / kQuads * kInputPitch + item % kQuads * 4;
    if (col + 4 <= a.cols) {
      copy_later(target, row + col);
    } else {
      store4(target, load4_within(row, col, a.cols));
    }
  }
}

// What a lane holds of 16 columns of 16 tokens, and of 8 rows of weights: factors of one product in
// bf16, or of two in tf32. Lane (g, t) = (lane / 4, lane % 4) takes columns 2t, 2t + 1, 2t + 8 and
// 2t + 9 of both; in tf32 the first two are columns t and t + 4 of one product, the others of
// another.
template <DType kDType>
inline constexpr unsigned kProducts = kDType == DType::bf16 ? 1 : 2;
template <DType kDType>
struct InputFragment {
  std::uint32_t a[kProducts<kDType>][4];
};
template <DType kDType>
struct WeightFragment {
  std::uint32_t b[kProducts<kDType>][2];
};

// From the lane's first column of tokens g and g + 8 on.
template <DType kDType>
MOERUN_DEVICE InputFragment<kDType> load_inputs(const float* top, const float* bottom) {
  InputFragment<kDType> x;
  MOERUN_UNROLL
  for (unsigned i = 0; i < 2; ++i) {
    const Float2 pairs[2] = {load2(top + i * 8), load2(bottom + i * 8)};
    MOERUN_UNROLL
    for (unsigned half = 0; half < 2; ++half) {
      const Float2 pair = pairs[half];
      if constexpr (kDType == DType::bf16) {
        x.a[0][i * 2 + half] = pack_bf16(pair.at[0], pair.at[1]);
      } else {
        x.a[i][half] = round_to_tf32(pair.at[0]);
        x.a[i][2 + half] = round_to_tf32(pair.at[1]);
      }
    }
  }
  return x;
}

// From the lane's first column of row g on, words of two weights.
template <DType kDType>
MOERUN_DEVICE WeightFragment<kDType> load_weights(const std::uint32_t* row) {
  WeightFragment<kDType> w;
  MOERUN_UNROLL
  for (unsigned i = 0; i < 2; ++i) {
    if constexpr (kDType == DType::bf16) {
      w.b[0][i] = row[i * 4];
    } else {
      w.b[i][0] = bits_of(low_f16(row[i * 4]));
      w.b[i][1] = bits_of(high_f16(row[i * 4]));
    }
  }
  return w;
}

template <DType kDType>
MOERUN_DEVICE void multiply(float (&sums)[4], const InputFragment<kDType>& x,
                            const WeightFragment<kDType>& w) {
  MOERUN_UNROLL
  for (unsigned i = 0; i < kProducts<kDType>; ++i) {
    if constexpr (kDType == DType::bf16) {
      multiply_tiles_bf16(sums, x.a[i], w.b[i]);
    } else {
      multiply_tiles_tf32(sums, x.a[i], w.b[i]);
    }
  }
}

// A block computes Tile::kRows x Tile::kTokens numbers of y, a warp a part of them in fragments of
// 8 rows x 16 tokens; lanes hold them as multiply_tiles_bf16 says, with tokens as rows of d.
// Shared memory: kStages buffers of columns: activations in float32, weights as they are.
// Preconditions: rows of weights padded to kTileCols; rows of activations on 16-byte borders.
template <DType kDType, typename Tile>
MOERUN_KERNEL MOERUN_BOUNDS(Tile::kThreads, Tile::kBlocks) gemm_half_kernel(ProductArguments a) {
  auto* shared = shared_memory<std::uint32_t>();
  const auto inputs_of = [&](unsigned stage) {
    return reinterpret_cast<float*>(shared) + stage * Tile::kStageWords;
  };
  const auto weights_of = [&](unsigned stage) {
    return shared + stage * Tile::kStageWords + Tile::kTokens * kInputPitch;
  };
  const unsigned first_token = block_y() * Tile::kTokens;
  const unsigned first_row = block_x() * Tile::kRows;
  const unsigned warp_token = warp() / Tile::kWarpsAlongRows * Tile::kWarpTokens;
  const unsigned warp_row = warp() % Tile::kWarpsAlongRows * Tile::kWarpRows;
  const unsigned group = lane() / 4;
  const unsigned pair = lane() % 4;
  float sums[Tile::kFragmentsOfTokens][Tile::kFragmentsOfRows][4] = {};

  const unsigned num_steps = (a.cols + kTileCols - 1) / kTileCols;
  const auto issue = [&](unsigned step) {
    if (step < num_steps) {
      const unsigned stage = step % Tile::kStages;
      load_stage<Tile>(a, first_token, first_row, step * kTileCols, inputs_of(stage),
                       weights_of(stage));
    }
    commit_copies();  // an empty group behind the end keeps the count
  };
  for (unsigned step = 0; step + 1 < Tile::kStages; ++step) issue(step);
  for (unsigned step = 0; step < num_steps; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    sync_block();  // this step's columns are there; the buffer before is done with
    issue(step + Tile::kStages - 1);
    const float* inputs = inputs_of(step % Tile::kStages) + (warp_token + group) * kInputPitch;
    const std::uint32_t* weights =
        weights_of(step % Tile::kStages) + (warp_row + group) * kWeightPitch;
    MOERUN_UNROLL
    for (unsigned k = 0; k < kTileCols; k += 16) {
      InputFragment<kDType> x[Tile::kFragmentsOfTokens];
      MOERUN_UNROLL
      for (unsigned m = 0; m < Tile::kFragmentsOfTokens; ++m) {
        const float* top = inputs + m * 16 * kInputPitch + k + pair * 2;
        x[m] = load_inputs<kDType>(top, top + 8 * kInputPitch);
      }
      MOERUN_UNROLL
      for (unsigned n = 0; n < Tile::kFragmentsOfRows; ++n) {
        const auto w = load_weights<kDType>(weights + n * 8 * kWeightPitch + k / 2 + pair);
        MOERUN_UNROLL
        for (unsigned m = 0; m < Tile::kFragmentsOfTokens; ++m) multiply(sums[m][n], x[m], w);
      }
    }
  }
  MOERUN_UNROLL
  for (unsigned m = 0; m < Tile::kFragmentsOfTokens; ++m) {
    MOERUN_UNROLL
    for (unsigned n = 0; n < Tile::kFragmentsOfRows; n += 2) {
      write_products<8>(
          a, [&](unsigned i) -> float& { return sums[m][n + i / 4][i % 4]; },
          [&](unsigned i) {
            return Place{first_token + warp_token + m * 16 + group + i % 4 / 2 * 8,
                         first_row + warp_row + (n + i / 4) * 8 + pair * 2 + i % 2};
          });
    }
  }
}

template <typename Tile>
unsigned num_blocks(const ProductArguments& a) {
  return (a.rows + Tile::kRows - 1) / Tile::kRows *
         ((a.tokens + Tile::kTokens - 1) / Tile::kTokens);
}

template <typename Tile>
void launch_tile(StreamHandle stream, DType dtype, const ProductArguments& arguments) {
  const LaunchShape shape{(arguments.rows + Tile::kRows - 1) / Tile::kRows,
                          (arguments.tokens + Tile::kTokens - 1) / Tile::kTokens, 1, Tile::kThreads,
                          Tile::kSharedBytes};
  if (dtype == DType::bf16) {
    launch<gemm_half_kernel<DType::bf16, Tile>>(stream, shape, arguments, "gemm_half");
  } else {
    launch<gemm_half_kernel<DType::f16, Tile>>(stream, shape, arguments, "gemm_half");
  }
}

}  // namespace

void launch_gemm_half(StreamHandle stream, DType dtype, const ProductArguments& arguments) {
  if (num_blocks<LargeTile>(arguments) >= kEnoughBlocks && arguments.tokens > MiddleTile::kTokens) {
    return launch_tile<LargeTile>(stream, dtype, arguments);
  }
  if (num_blocks<MiddleTile>(arguments) >= kEnoughBlocks ||
      arguments.tokens > 2 * SmallTile::kTokens) {
    return launch_tile<MiddleTile>(stream, dtype, arguments);
  }
  launch_tile<SmallTile>(stream, dtype, arguments);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
