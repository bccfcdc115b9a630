// The expert kernels: weighted sums of rows, and one quantum of a segment. Included like
// kernels_dot.h.
//
// Order of operations: y[h] of a quantum sums its records in index order by fused multiply-add,
// starting from zero; only then is it added to what earlier quanta gave.

constexpr std::size_t kMaxQuantum = 32;

template <typename Weight>
constexpr std::size_t DotStep = Simd::template DotWeight<Weight>::kStep;

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

constexpr std::size_t kSumColumns = Simd::kSumVectors * W;  // columns of a tile

template <typename Weight>
void sum_rows(const Weight* rows, std::size_t row_stride, std::size_t num_rows, std::size_t n,
              const float* const* weights, float* const* outs, std::size_t num_tokens,
              bool accumulate) {
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

// activated = silu(gate) * up, n a multiple of W.
inline void silu_mul(const float* gate, const float* up, float* activated, std::size_t n) {
  for (std::size_t i = 0; i < n; i += W) {
    const V g = Simd::load(gate + i);
    const V sigmoid_divisor = Simd::add(Simd::set1(1.0f), exp_vector(Simd::sub(Simd::zero(), g)));
    Simd::store(activated + i, Simd::mul(Simd::div(g, sigmoid_divisor), Simd::load(up + i)));
  }
}

// Asks for kBytes bytes from `p` on.
template <std::size_t kBytes>
inline __attribute__((always_inline)) void prefetch_bytes(const std::byte* p) {
#pragma GCC unroll 16
  for (std::size_t b = 0; b < kBytes; b += 64) __builtin_prefetch(p + b, 0, 2);
}

// gate_up[0][i] = gate_i . x and gate_up[1][i] = up_i . x for `count` records, while what `next`
// names is asked for.
template <typename Weight>
inline void gate_up_one_token(const Weight* records, std::size_t count, std::size_t hidden,
                              const float* x, float (*gate_up)[kMaxQuantum],
                              const std::byte* next) {
  constexpr std::size_t kTile = Simd::kOneTokenRecords;
  constexpr std::size_t kElementBytes = 2 * kTile * sizeof(Weight);  // of all rows of a tile
  const Weight* rows[2 * kTile];
  float products[2 * kTile];
  float* out = products;
  for (std::size_t i0 = 0; i0 < count; i0 += kTile) {
    const std::size_t tile = count - i0 < kTile ? count - i0 : kTile;
    for (std::size_t i = 0; i < tile; ++i) {
      rows[i] = records + (i0 + i) * 3 * hidden;
      rows[tile + i] = rows[i] + hidden;
    }
    if (tile == kTile) {
      dot_tile_whole<2 * kTile, 1>(rows, &x, hidden, &out, 0, [next](std::size_t i) {
        prefetch_bytes<DotStep<Weight> * kElementBytes>(next + i * kElementBytes);
      });
      next += hidden * kElementBytes;
    } else {
      for (std::size_t r = 0; r < 2 * tile; ++r) {
        dot_tile_whole<1, 1>(rows + r, &x, hidden, &out, r);
      }
    }
    for (std::size_t i = 0; i < tile; ++i) {
      gate_up[0][i0 + i] = products[i];
      gate_up[1][i0 + i] = products[tile + i];
    }
  }
}

// y (+)= sum of weights[i] * down_i over kCount records, continuing the sum that y holds unless
// `first`; what `next` names is asked for meanwhile, as much as is used up.
template <std::size_t kCount, typename Weight>
inline void down_one_token(const Weight* down, std::size_t hidden, const float* weights, float* y,
                           bool first, const std::byte* next) {
  constexpr std::size_t kStepBytes = kCount * W * sizeof(Weight);
  V a[kCount];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kCount; ++i) a[i] = Simd::set1(weights[i]);
  for (std::size_t h = 0; h < hidden; h += W, next += kStepBytes) {
    V sum = first ? Simd::zero() : Simd::load(y + h);
    prefetch_bytes<kStepBytes>(next);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kCount; ++i) {
      sum = Simd::fma(a[i], Simd::load(down + i * 3 * hidden + h), sum);
    }
    Simd::store(y + h, sum);
  }
}

// One token: the records are walked once, front to back, in groups whose gate and up rows are
// reduced together and whose down rows are added to y while y is in the first-level cache.
template <typename Weight>
void quantum_one_token(const Weight* records, std::size_t num_records, std::size_t hidden,
                       const float* x, float* y, bool accumulate, bool more_follows,
                       float* partial) {
  constexpr std::size_t kGroup = 2 * Simd::kOneTokenRecords;
  float* target = accumulate ? partial : y;
  for (std::size_t i0 = 0; i0 < num_records; i0 += kGroup) {
    const std::size_t count = num_records - i0 < kGroup ? num_records - i0 : kGroup;
    const Weight* group = records + i0 * 3 * hidden;
    alignas(64) float gate_up[2][kMaxQuantum] = {};
    alignas(64) float a[kMaxQuantum];
    // What another thread will read must not be asked for here: look back instead of ahead.
    const bool last = i0 + kGroup >= num_records && !more_follows;
    const auto* next =
        reinterpret_cast<const std::byte*>(last ? group : group + kGroup * 3 * hidden);
    gate_up_one_token(group, count, hidden, x, gate_up, next);
    silu_mul(gate_up[0], gate_up[1], a, (count + W - 1) / W * W);
    const Weight* down = group + 2 * hidden;
    if (count == kGroup) {
      down_one_token<kGroup>(down, hidden, a, target, i0 == 0,
                             next + kGroup * 2 * hidden * sizeof(Weight));
    } else {
      for (std::size_t i = 0; i < count; ++i) {
        const Weight* row = down + i * 3 * hidden;
        down_one_token<1>(row, hidden, a + i, target, i0 + i == 0,
                          reinterpret_cast<const std::byte*>(row));
      }
    }
  }
  if (accumulate) {
    for (std::size_t h = 0; h < hidden; h += W) {
      Simd::store(y + h, Simd::add(Simd::load(y + h), Simd::load(partial + h)));
    }
  }
}

struct SegmentScratch {
  DotScratch dot;
  float gate_up[kMaxTokens][2 * kMaxQuantum];
  float activated[kMaxTokens][kMaxQuantum];
};

template <typename Weight>
void quantum_many_tokens(const Weight* records, std::size_t num_records, std::size_t hidden,
                         const float* const* xs, float* const* ys, std::size_t num_tokens,
                         bool accumulate, SegmentScratch& scratch) {
  const Weight* rows[2 * kMaxQuantum];
  for (std::size_t i = 0; i < num_records; ++i) {
    rows[i] = records + i * 3 * hidden;
    rows[num_records + i] = records + (i * 3 + 1) * hidden;
  }
  float* products[kMaxTokens];
  const float* activated[kMaxTokens];
  for (std::size_t t = 0; t < num_tokens; ++t) {
    products[t] = scratch.gate_up[t];
    activated[t] = scratch.activated[t];
  }
  // While the last products are formed, the down rows are asked for; while
  // those are summed, the first gate and up rows of what follows in memory.
  const Weight* down = records + 2 * hidden;
  const std::byte* down_rows[2 * kMaxQuantum];
  const std::byte* following[2 * kMaxQuantum];
  for (std::size_t r = 0; r < 2 * num_records; ++r) {
    const std::size_t half = r < num_records || hidden <= kBlockK ? 0 : kBlockK;
    down_rows[r] = reinterpret_cast<const std::byte*>(down + r % num_records * 3 * hidden + half);
    following[r] =
        reinterpret_cast<const std::byte*>(records + ((num_records + r / 2) * 3 + r % 2) * hidden);
  }
  dot_rows(rows, 2 * num_records, hidden, xs, products, num_tokens, scratch.dot, down_rows);
  for (std::size_t t = 0; t < num_tokens; ++t) {
    alignas(64) float gate[kMaxQuantum] = {};
    alignas(64) float up[kMaxQuantum] = {};
    for (std::size_t i = 0; i < num_records; ++i) {
      gate[i] = products[t][i];
      up[i] = products[t][num_records + i];
    }
    silu_mul(gate, up, scratch.activated[t], kMaxQuantum);
  }
  if (num_tokens <= Simd::kSumTokens) {
    sum_rows(down, 3 * hidden, num_records, hidden, activated, ys, num_tokens, accumulate);
  } else {
    const std::size_t row_bytes = (hidden < kBlockK ? hidden : kBlockK) * sizeof(Weight);
    auto prefetcher =
        RowPrefetcher::over(following, 2 * num_records, row_bytes, hidden / kSumColumns + 1);
    sum_rows_converted(down, 3 * hidden, num_records, hidden, activated, ys, num_tokens, accumulate,
                       prefetcher);
  }
}

template <typename Weight>
void segment_quantum_typed(const std::byte* records, std::size_t num_records, std::size_t hidden,
                           const float* const* xs, float* const* ys, std::size_t num_tokens,
                           bool accumulate, bool more_follows, std::byte* scratch) {
  const auto* typed = reinterpret_cast<const Weight*>(records);
  if (num_tokens == 1) {
    quantum_one_token(typed, num_records, hidden, xs[0], ys[0], accumulate, more_follows,
                      reinterpret_cast<float*>(scratch));
  } else {
    quantum_many_tokens(typed, num_records, hidden, xs, ys, num_tokens, accumulate,
                        *reinterpret_cast<SegmentScratch*>(scratch));
  }
}
