// Dot products of weight rows with token rows. Included only by the kernel translation units,
// inside their anonymous namespace, after `Simd` is defined: nothing here may have external
// linkage, or the linker could pick an AVX-512 copy for a processor without it.
//
// Order of operations, the same in every path: lane l of one accumulator sums the products of
// elements l, l + W, l + 2W, ... by fused multiply-add; Simd::sum_lanes adds the lanes in a fixed
// tree.

constexpr std::size_t kBlockK = 1024;   // elements of a row kept in the first-level cache
constexpr std::size_t kBlockRows = 64;  // rows converted at a time: gate and up of one quantum
// From this many tokens on, converting weights to float32 once costs less than converting them for
// every tile.
constexpr std::size_t kConvertFromTokens = Simd::kDirectTiles * Simd::kDotTokens;

using V = Simd::V;
constexpr std::size_t W = Simd::kWidth;

// A number of tokens that a kernel is compiled for.
template <int n>
struct Tile {
  static constexpr int value = n;
};

// Calls body(first_token, Tile<n>) for runs of n = kTokens tokens, then for what is left.
template <int kTokens, typename Body>
inline void for_token_tiles(std::size_t num_tokens, Body&& body) {
  std::size_t t = 0;
  for (; t + kTokens <= num_tokens; t += kTokens) body(t, Tile<kTokens>{});
  const std::size_t left = num_tokens - t;
  if constexpr (kTokens > 5) {
    if (left == 5) return body(t, Tile<5>{});
  }
  if constexpr (kTokens > 4) {
    if (left == 4) return body(t, Tile<4>{});
  }
  if (left == 3) return body(t, Tile<3>{});
  if (left == 2) return body(t, Tile<2>{});
  if (left == 1) return body(t, Tile<1>{});
}

// How far ahead of its use memory is asked for, in every one of the rows that are read in step:
// some 4 to 6 KiB in all. Less comes late, more drives what is awaited out of the first-level
// cache.
constexpr std::size_t kAheadBytes = 512;

struct NothingAhead {
  inline __attribute__((always_inline)) void operator()(std::size_t) const {}
};

// acc[r][t] += rows[r] . xs[t] over elements [0, k). ahead(i) is called at every cache line of the
// rows, to ask for memory that comes later.
template <int R, int T, typename Weight, typename Ahead>
inline __attribute__((always_inline)) void dot_tile(const Weight* const* rows,
                                                    const float* const* xs, std::size_t k,
                                                    V (&acc)[R][T], const Ahead& ahead) {
  const Weight* w[R];
  const float* x[T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) w[r] = rows[r];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) x[t] = xs[t];
  if constexpr (T == 1) {
    for (std::size_t i = 0; i < k; i += kLine<Weight>) {
      ahead(i);
      typename Simd::template LineInput<Weight> xv;
      xv.load(x[0] + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        typename Simd::template LineWeight<Weight> wv;
        wv.load(w[r] + i);
        acc[r][0] = Simd::line_step(acc[r][0], wv, xv);
      }
    }
    return;
  }
  constexpr std::size_t kStep = Simd::template DotWeight<Weight>::kStep;
  for (std::size_t line = 0; line < k; line += kLine<Weight>) {
    ahead(line);
#pragma GCC unroll 4
    for (std::size_t i = line; i < line + kLine<Weight>; i += kStep) {
      typename Simd::template DotWeight<Weight> wv[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) wv[r].load(w[r] + i);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        typename Simd::template DotInput<Weight> xv;
        xv.load(x[t] + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[r][t] = Simd::dot_step(acc[r][t], wv[r], xv);
      }
    }
  }
}

// outs[t][first_row + r] = rows[r] . xs[t]. next: the R rows that will be read after these, or
// none.
template <int R, int T, typename Weight>
inline void dot_tile_whole(const Weight* const* rows, const float* const* xs, std::size_t k,
                           float* const* outs, std::size_t first_row,
                           const Weight* const* next = nullptr) {
  V acc[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[r][t] = Simd::zero();
  }
  if (next == nullptr) {
    dot_tile<R, T>(rows, xs, k, acc, NothingAhead{});
  } else {
    // The rows ask for themselves until their end comes near, then for those that follow.
    constexpr std::size_t kAhead = kAheadBytes / sizeof(Weight);
    const std::size_t tail = k < kAhead ? k : kAhead;
    const std::size_t head = k - tail;
    const Weight* tail_rows[R];
    const float* tail_xs[T];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) tail_rows[r] = rows[r] + head;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) tail_xs[t] = xs[t] + head;
    dot_tile<R, T>(rows, xs, head, acc, [&](std::size_t i) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(rows[r] + tail + i);
        __builtin_prefetch(next[r] + i, 0, 2);
      }
    });
    dot_tile<R, T>(tail_rows, tail_xs, tail, acc, [&](std::size_t i) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(next[r] + i);
        __builtin_prefetch(next[r] + head + i, 0, 2);
      }
    });
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) outs[t][first_row + r] = Simd::sum_lanes(acc[r][t]);
  }
}

// Few tokens: weights are streamed once from memory and converted in registers, for some tokens at
// a time. rows_after: as many rows as there are, which will be read next.
template <typename Weight>
void dot_rows_direct(const Weight* const* rows, std::size_t num_rows, std::size_t k,
                     const float* const* xs, float* const* outs, std::size_t num_tokens,
                     const std::byte* const* rows_after) {
  constexpr int kRows = Simd::kDotRows;
  std::size_t r = 0;
  for (; r + kRows <= num_rows; r += kRows) {
    const Weight* next[kRows];
    const bool last = r + 2 * kRows > num_rows;
#pragma GCC unroll 8
    for (int a = 0; a < kRows; ++a) {
      next[a] = last ? reinterpret_cast<const Weight*>(rows_after[a]) : rows[r + kRows + a];
    }
    for_token_tiles<Simd::kDotTokens>(num_tokens, [&](std::size_t t, auto tile) {
      // The first tokens have asked for the rows that come next.
      dot_tile_whole<kRows, decltype(tile)::value>(rows + r, xs + t, k, outs + t, r,
                                                   t == 0 ? next : nullptr);
    });
  }
  for (; r < num_rows; ++r) {
    for_token_tiles<Simd::kDotTokens>(num_tokens, [&](std::size_t t, auto tile) {
      dot_tile_whole<1, decltype(tile)::value>(rows + r, xs + t, k, outs + t, r);
    });
  }
}

// Asks for `row_bytes` bytes of each of some rows, a few lines at a time between tiles of work, so
// that memory delivers while the arithmetic goes on.
struct RowPrefetcher {
  const std::byte* const* rows = nullptr;
  std::size_t num_rows = 0;
  std::size_t row_bytes = 0;
  std::size_t lines_per_call = 0;
  std::size_t row = 0;
  std::size_t offset = 0;

  static RowPrefetcher over(const std::byte* const* rows, std::size_t num_rows,
                            std::size_t row_bytes, std::size_t num_calls) {
    const std::size_t lines = num_rows * ((row_bytes + 63) / 64);
    return {rows, num_rows, row_bytes, (lines + num_calls - 1) / num_calls};
  }
  void step() {
    for (std::size_t line = 0; line < lines_per_call && row < num_rows; ++line) {
      __builtin_prefetch(rows[row] + offset, 0, 2);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        ++row;
      }
    }
  }
};

// Where the blocked path keeps what it reuses; see dot_rows_blocked.
struct DotScratch {
  float weights[kBlockRows * kBlockK];              // one block of rows as float32
  float accumulators[kMaxTokens * kBlockRows * W];  // lanes of every (token, row)
};

template <int R, int T, typename Weight>
inline void dot_tile_resumed(const Weight* const* rows, const float* const* xs, std::size_t k,
                             float* lanes, bool first) {
  V acc[R][T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][t] = first ? Simd::zero() : Simd::load(lanes + (t * kBlockRows + r) * W);
    }
  }
  dot_tile<R, T>(rows, xs, k, acc, NothingAhead{});
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) Simd::store(lanes + (t * kBlockRows + r) * W, acc[r][t]);
  }
}

template <int T, typename Weight>
void dot_block_tokens(const Weight* const* rows, std::size_t num_rows, const float* const* xs,
                      std::size_t k, float* lanes, bool first, RowPrefetcher& prefetcher) {
  std::size_t r = 0;
  for (; r + Simd::kDotRows <= num_rows; r += Simd::kDotRows) {
    prefetcher.step();
    dot_tile_resumed<Simd::kDotRows, T>(rows + r, xs, k, lanes + r * W, first);
  }
  for (; r < num_rows; ++r) dot_tile_resumed<1, T>(rows + r, xs, k, lanes + r * W, first);
}

// Many tokens, at most kBlockRows rows; rows_after[r] is what will be read next, one per row: a
// block of the rows, kBlockK elements wide, is converted once and stays in cache while all tokens
// pass; the lanes wait in memory between blocks.
template <typename Weight>
void dot_rows_blocked(const Weight* const* rows, std::size_t num_rows, std::size_t k,
                      const float* const* xs, float* const* outs, std::size_t num_tokens,
                      DotScratch& scratch, const std::byte* const* rows_after) {
  const float* x[kMaxTokens];
  typename Simd::template BlockedWeight<Weight> const* block[kBlockRows];
  const std::byte* next[kBlockRows];
  const std::size_t num_calls =
      (num_rows / Simd::kDotRows + 1) * (num_tokens / Simd::kDotTokens + 1);
  for (std::size_t k0 = 0; k0 < k; k0 += kBlockK) {
    const std::size_t width = k - k0 < kBlockK ? k - k0 : kBlockK;
    for (std::size_t r = 0; r < num_rows; ++r) {
      block[r] = Simd::to_block(rows[r] + k0, scratch.weights + r * kBlockK, width);
      next[r] =
          k0 + width < k ? reinterpret_cast<const std::byte*>(rows[r] + k0 + width) : rows_after[r];
    }
    const std::size_t next_width =
        k0 + width < k && k - k0 - width < kBlockK ? k - k0 - width : kBlockK;
    auto prefetcher = RowPrefetcher::over(next, num_rows, next_width * sizeof(Weight), num_calls);
    for (std::size_t t = 0; t < num_tokens; ++t) x[t] = xs[t] + k0;
    const bool first = k0 == 0;
    for_token_tiles<Simd::kDotTokens>(num_tokens, [&](std::size_t t, auto tile) {
      dot_block_tokens<decltype(tile)::value>(block, num_rows, x + t, width,
                                              scratch.accumulators + t * kBlockRows * W, first,
                                              prefetcher);
    });
  }
  for (std::size_t t = 0; t < num_tokens; ++t) {
    const float* lanes = scratch.accumulators + t * kBlockRows * W;
    std::size_t r = 0;
    for (; r + W <= num_rows; r += W) Simd::sum_lanes_of_vectors(lanes + r * W, outs[t] + r);
    for (; r < num_rows; ++r) outs[t][r] = Simd::sum_lanes(Simd::load(lanes + r * W));
  }
}

template <typename Weight>
void dot_rows(const Weight* const* rows, std::size_t num_rows, std::size_t k,
              const float* const* xs, float* const* outs, std::size_t num_tokens,
              DotScratch& scratch, const std::byte* const* rows_after) {
  if (num_tokens < kConvertFromTokens) {
    dot_rows_direct(rows, num_rows, k, xs, outs, num_tokens, rows_after);
  } else {
    dot_rows_blocked(rows, num_rows, k, xs, outs, num_tokens, scratch, rows_after);
  }
}

template <typename Weight>
void dot_typed(const std::byte* data, std::size_t row_stride, std::size_t num_rows, std::size_t k,
               const float* const* xs, float* const* outs, std::size_t num_tokens,
               DotScratch& scratch) {
  const Weight* rows[kBlockRows];
  const std::byte* rows_after[kBlockRows];
  float* shifted[kMaxTokens];
  for (std::size_t r0 = 0; r0 < num_rows; r0 += kBlockRows) {
    const std::size_t count = num_rows - r0 < kBlockRows ? num_rows - r0 : kBlockRows;
    for (std::size_t r = 0; r < count; ++r) {
      rows[r] = reinterpret_cast<const Weight*>(data + (r0 + r) * row_stride);
      // Behind the last row lies what another thread reads: ask for this row instead.
      const std::size_t after = r0 + count + r;
      rows_after[r] = data + (after < num_rows ? after : r0 + r) * row_stride;
    }
    for (std::size_t t = 0; t < num_tokens; ++t) shifted[t] = outs[t] + r0;
    dot_rows(rows, count, k, xs, shifted, num_tokens, scratch, rows_after);
  }
}
