// Many tokens in float32: for F32 weights, and for the router.
#include "kernels/dtype_dispatch.h"
#include "kernels/product.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kTileTokens = 32;
constexpr unsigned kTileRows = 64;
constexpr unsigned kTileCols = 32;  // rows of weights are padded to a multiple of it
constexpr unsigned kThreads = 128;
// Sixteen bytes more than a row needs: eight lanes that read one column of eight rows hit all
// banks.
constexpr unsigned kPitch = kTileCols + 4;

constexpr unsigned kThreadsX = 16;                    // a thread's rows are that far apart ...
constexpr unsigned kThreadsY = kThreads / kThreadsX;  // ... and its tokens that far
constexpr unsigned kRowsPerThread = kTileRows / kThreadsX;
constexpr unsigned kTokensPerThread = kTileTokens / kThreadsY;

// What a thread carries from global to shared memory of one tile.
template <DType kDType>
struct Carried {
  static constexpr unsigned kWidth = kPackWeights<kDType>;
  static constexpr unsigned kPacksPerRow = kTileCols / kWidth;
  static constexpr unsigned kNumPacks = kTileRows * kPacksPerRow / kThreads;
  static constexpr unsigned kNumInputs = kTileTokens * kTileCols / 4 / kThreads;

  Pack16 packs[kNumPacks];
  Float4 inputs[kNumInputs];

  MOERUN_DEVICE void load(const ProductArguments& a, unsigned first_token, unsigned first_row,
                          unsigned first_col) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kNumPacks; ++i) {
      const unsigned item = i * kThreads + thread_x();
      const unsigned row = first_row + item / kPacksPerRow;
      packs[i] = load_once(a.weight + (row < a.rows ? row : a.rows - 1) * a.row_bytes +
                           (first_col / kWidth + item % kPacksPerRow) * sizeof(Pack16));
    }
    MOERUN_UNROLL
    for (unsigned i = 0; i < kNumInputs; ++i) {
      const unsigned item = i * kThreads + thread_x();
      const unsigned token = first_token + item / (kTileCols / 4);
      inputs[i] = load4_within(a.x + (token < a.tokens ? token : a.tokens - 1) * a.x_pitch,
                               first_col + item % (kTileCols / 4) * 4, a.cols);
    }
  }

  MOERUN_DEVICE void store(float* weights, float* x) const {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kNumPacks; ++i) {
      const unsigned item = i * kThreads + thread_x();
      float* target = weights + item / kPacksPerRow * kPitch + item % kPacksPerRow * kWidth;
      MOERUN_UNROLL
      for (unsigned quarter = 0; quarter < kWidth; quarter += 4) {
        Float4 values;
        MOERUN_UNROLL
        for (unsigned j = 0; j < 4; ++j) values.at[j] = weight_at<kDType>(packs[i], quarter + j);
        store4(target + quarter, values);
      }
    }
    MOERUN_UNROLL
    for (unsigned i = 0; i < kNumInputs; ++i) {
      const unsigned item = i * kThreads + thread_x();
      store4(x + item / (kTileCols / 4) * kPitch + item % (kTileCols / 4) * 4, inputs[i]);
    }
  }
};

// A block computes kTileRows x kTileTokens numbers of y; a thread 4 x 4 of them, each summed in the
// order of the columns. The next tile's loads are under way while one is multiplied.
// Shared memory: a tile of weights and one of activations, in float32.
// Preconditions: rows of weights padded to kTileCols; rows of activations on 16-byte borders.
template <DType kDType>
MOERUN_KERNEL MOERUN_BOUNDS(kThreads, 4) gemm_kernel(ProductArguments a) {
  auto* weights = shared_memory<float>();        // (kTileRows, kPitch)
  float* inputs = weights + kTileRows * kPitch;  // (kTileTokens, kPitch)
  const unsigned first_row = block_x() * kTileRows;
  const unsigned first_token = block_y() * kTileTokens;
  const unsigned tx = thread_x() % kThreadsX;
  const unsigned ty = thread_x() / kThreadsX;
  float sums[kTokensPerThread][kRowsPerThread] = {};
  Carried<kDType> carried;
  carried.load(a, first_token, first_row, 0);
  for (unsigned first_col = 0; first_col < a.cols; first_col += kTileCols) {
    carried.store(weights, inputs);
    sync_block();
    if (first_col + kTileCols < a.cols) {
      carried.load(a, first_token, first_row, first_col + kTileCols);
    }
    MOERUN_UNROLL
    for (unsigned k = 0; k < kTileCols; k += 4) {
      Float4 w[kRowsPerThread];
      MOERUN_UNROLL
      for (unsigned r = 0; r < kRowsPerThread; ++r) {
        w[r] = load4(weights + (r * kThreadsX + tx) * kPitch + k);
      }
      MOERUN_UNROLL
      for (unsigned t = 0; t < kTokensPerThread; ++t) {
        const Float4 x = load4(inputs + (t * kThreadsY + ty) * kPitch + k);
        MOERUN_UNROLL
        for (unsigned r = 0; r < kRowsPerThread; ++r) {
          MOERUN_UNROLL
          for (unsigned i = 0; i < 4; ++i) {
            sums[t][r] = fused_multiply_add(w[r].at[i], x.at[i], sums[t][r]);
          }
        }
      }
    }
    sync_block();
  }
  write_products<kTokensPerThread * kRowsPerThread>(
      a, [&](unsigned i) -> float& { return sums[i / kRowsPerThread][i % kRowsPerThread]; },
      [&](unsigned i) {
        return Place{first_token + i / kRowsPerThread * kThreadsY + ty,
                     first_row + i % kRowsPerThread * kThreadsX + tx};
      });
}

}  // namespace

void launch_gemm(StreamHandle stream, DType dtype, const ProductArguments& arguments) {
  const LaunchShape shape{(arguments.rows + kTileRows - 1) / kTileRows,
                          (arguments.tokens + kTileTokens - 1) / kTileTokens, 1, kThreads,
                          (kTileRows + kTileTokens) * kPitch * sizeof(float)};
  dispatch_dtype(dtype, [&](auto constant) {
    launch<gemm_kernel<constant.value>>(stream, shape, arguments, "gemm");
  });
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
