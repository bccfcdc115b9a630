// Weighted sums of rows. Included like kernels_dot.h, after it.
//
// Order of operations, the same in every path: a column sums its rows in index order by fused
// multiply-add, starting from zero; only then is it stored or added.

constexpr std::size_t kMaxQuantum = 32;

// acc[t][v] = sum over rows of weights[t][j] * rows[j][v * W ...].
template <int T, int N, typename Weight>
inline __attribute__((always_inline)) void sum_tile(const Weight* rows, std::size_t row_stride,
                                                    std::size_t num_rows,
                                                    const float* const* weights, V (&acc)[T][N]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) acc[t][v] = Simd::zero();
  }
  for (std::size_t j = 0; j < num_rows; ++j) {
    const Weight* row = rows + j * row_stride;
    V d[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) d[v] = Simd::load(row + v * W);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const V a = Simd::set1(weights[t][j]);
#pragma GCC unroll 8
      for (int v = 0; v < N; ++v) acc[t][v] = Simd::fma(a, d[v], acc[t][v]);
    }
  }
}

template <int T, int N, typename Weight>
inline void sum_columns(const Weight* rows, std::size_t row_stride, std::size_t num_rows,
                        const float* const* weights, float* const* outs, std::size_t column,
                        bool accumulate) {
  V acc[T][N];
  sum_tile<T, N>(rows, row_stride, num_rows, weights, acc);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    float* out = outs[t] + column;
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const V sum = accumulate ? Simd::add(Simd::load(out + v * W), acc[t][v]) : acc[t][v];
      Simd::store(out + v * W, sum);
    }
  }
}

template <int N, typename Weight>
void sum_tokens(const Weight* rows, std::size_t row_stride, std::size_t num_rows,
                const float* const* weights, float* const* outs, std::size_t column,
                std::size_t num_tokens, bool accumulate) {
  for_token_tiles<Simd::kSumTokens>(num_tokens, [&](std::size_t t, auto tile) {
    sum_columns<decltype(tile)::value, N>(rows, row_stride, num_rows, weights + t, outs + t, column,
                                          accumulate);
  });
}

// One token leaves registers for wider tiles, so that rows are read in longer pieces.
template <typename Weight>
void sum_rows_one_token(const Weight* rows, std::size_t row_stride, std::size_t num_rows,
                        std::size_t n, const float* const* weights, float* const* outs,
                        bool accumulate) {
  constexpr int kVectors = 2 * Simd::kSumVectors;
  std::size_t column = 0;
  for (; column + kVectors * W <= n; column += kVectors * W) {
    sum_columns<1, kVectors>(rows + column, row_stride, num_rows, weights, outs, column,
                             accumulate);
  }
  for (; column < n; column += W) {
    sum_columns<1, 1>(rows + column, row_stride, num_rows, weights, outs, column, accumulate);
  }
}

constexpr std::size_t kSumColumns = Simd::kSumVectors * W;  // columns of a tile

template <typename Weight>
void sum_rows(const Weight* rows, std::size_t row_stride, std::size_t num_rows, std::size_t n,
              const float* const* weights, float* const* outs, std::size_t num_tokens,
              bool accumulate) {
  if (num_tokens == 1) {
    return sum_rows_one_token(rows, row_stride, num_rows, n, weights, outs, accumulate);
  }
  std::size_t column = 0;
  for (; column + kSumColumns <= n; column += kSumColumns) {
    sum_tokens<Simd::kSumVectors>(rows + column, row_stride, num_rows, weights, outs, column,
                                  num_tokens, accumulate);
  }
  for (; column < n; column += W) {
    sum_tokens<1>(rows + column, row_stride, num_rows, weights, outs, column, num_tokens,
                  accumulate);
  }
}

// The same with the rows of a tile converted to float32 first.
template <typename Weight>
void sum_rows_converted(const Weight* rows, std::size_t row_stride, std::size_t num_rows,
                        std::size_t n, const float* const* weights, float* const* outs,
                        std::size_t num_tokens, bool accumulate, RowPrefetcher& prefetcher) {
  alignas(64) float tile[kMaxQuantum * kSumColumns];
  for (std::size_t column = 0; column < n; column += kSumColumns) {
    const std::size_t width = n - column < kSumColumns ? n - column : kSumColumns;
    prefetcher.step();
    for (std::size_t j = 0; j < num_rows; ++j) {
      for (std::size_t c = 0; c < width; c += W) {
        Simd::store(tile + j * kSumColumns + c, Simd::load(rows + j * row_stride + column + c));
      }
    }
    if (width == kSumColumns) {
      sum_tokens<Simd::kSumVectors>(static_cast<const float*>(tile), kSumColumns, num_rows, weights,
                                    outs, column, num_tokens, accumulate);
    } else {
      for (std::size_t c = 0; c < width; c += W) {
        sum_tokens<1>(static_cast<const float*>(tile) + c, kSumColumns, num_rows, weights, outs,
                      column + c, num_tokens, accumulate);
      }
    }
  }
}
