// The expert kernels: one quantum of a segment. Included like kernels_dot.h, after kernels_sum.h.
//
// Order of operations: y[h] of a quantum sums its records in index order by fused multiply-add,
// starting from zero; only then is it added to what earlier quanta gave.

// activated = silu(gate) * up, n a multiple of W.
inline void silu_mul(const float* gate, const float* up, float* activated, std::size_t n) {
  for (std::size_t i = 0; i < n; i += W) {
    const V g = Simd::load(gate + i);
    const V sigmoid_divisor = Simd::add(Simd::set1(1.0f), exp_vector(Simd::sub(Simd::zero(), g)));
    Simd::store(activated + i, Simd::mul(Simd::div(g, sigmoid_divisor), Simd::load(up + i)));
  }
}

constexpr std::size_t kGroup = Simd::kOneTokenRecords;

// The rows that one step of walking an expert reads together.
template <typename Weight>
struct WalkRows {
  const Weight* gates;  // gate rows of a group of records; the up row follows each
  const Weight* downs;  // down rows of the group before
};

// Elements [begin, end) of a step: the gate and up rows of one group of records are multiplied with
// x, while the down rows of the group before it, times their weights, are added to y. `soon` is
// where `rows` will be kAheadBytes later, `next` the group to be read in the next step.
template <bool kGates, bool kDowns, bool kGatesSoon, bool kDownsSoon, typename Weight>
inline __attribute__((always_inline)) void walk_lines(
    const WalkRows<Weight>& rows, const WalkRows<Weight>& soon, const Weight* next,
    std::size_t begin, std::size_t end, std::size_t hidden, const float* x, float* y, bool first,
    const V (&weights)[kGroup], V (&acc)[2 * kGroup]) {
  const std::size_t record = 3 * hidden;
  for (std::size_t h = begin; h < end; h += kLine<Weight>) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < kGroup; ++i) {
      if constexpr (kGatesSoon) {
        __builtin_prefetch(soon.gates + i * record + h);
        __builtin_prefetch(soon.gates + i * record + hidden + h);
      }
      if constexpr (kDownsSoon) __builtin_prefetch(soon.downs + i * record + h);
    }
#pragma GCC unroll 32
    for (std::size_t r = 0; r < 3 * kGroup; ++r) __builtin_prefetch(next + r * hidden + h, 0, 2);
    if constexpr (kGates) {
      typename Simd::template LineInput<Weight> xv;
      xv.load(x + h);
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kGroup; ++i) {
        typename Simd::template LineWeight<Weight> row;
        row.load(rows.gates + i * record + h);
        acc[i] = Simd::line_step(acc[i], row, xv);
        row.load(rows.gates + i * record + hidden + h);
        acc[kGroup + i] = Simd::line_step(acc[kGroup + i], row, xv);
      }
    }
    if constexpr (kDowns) {
      constexpr std::size_t kParts = kLine<Weight> / W;
      V sums[kParts];
#pragma GCC unroll 8
      for (std::size_t v = 0; v < kParts; ++v) {
        sums[v] = first ? Simd::zero() : Simd::load(y + h + v * W);
      }
#pragma GCC unroll 16
      for (std::size_t i = 0; i < kGroup; ++i) {
        V down[kParts];
        Simd::load_line(rows.downs + i * record + h, down);
#pragma GCC unroll 8
        for (std::size_t v = 0; v < kParts; ++v) sums[v] = Simd::fma(weights[i], down[v], sums[v]);
      }
#pragma GCC unroll 8
      for (std::size_t v = 0; v < kParts; ++v) Simd::store(y + h + v * W, sums[v]);
    }
  }
}

// One step of walking an expert, over whole rows. Doing gates and downs in one loop keeps memory
// busy: apart, it would idle at every change between them. kGates and kDowns switch the two halves,
// at a quantum's ends. The rows ask for themselves ahead of their use, and near their end for the
// rows of the next step: `next` for the gates; the downs of the next step are this step's group.
template <bool kGates, bool kDowns, typename Weight>
inline void walk_group(const Weight* group, std::size_t hidden, const float* x, const float* a,
                       float* y, bool first, float* products, const Weight* next) {
  V weights[kGroup];
  V acc[2 * kGroup];
#pragma GCC unroll 16
  for (std::size_t i = 0; i < kGroup; ++i) {
    weights[i] = kDowns ? Simd::set1(a[i]) : Simd::zero();
    acc[i] = Simd::zero();
    acc[kGroup + i] = Simd::zero();
  }
  const std::size_t group_size = kGroup * 3 * hidden;
  const Weight* downs = group + 2 * hidden;
  const WalkRows<Weight> rows{group, kDowns ? downs - group_size : downs};
  constexpr std::size_t kAhead = kAheadBytes / sizeof(Weight);
  const std::size_t tail = hidden < kAhead ? hidden : kAhead;
  const std::size_t head = hidden - tail;
  walk_lines<kGates, kDowns, kGates, kDowns>(rows, {rows.gates + tail, rows.downs + tail}, next, 0,
                                             head, hidden, x, y, first, weights, acc);
  walk_lines<kGates, kDowns, true, kGates>(rows, {next - head, downs - head}, next, head, hidden,
                                           hidden, x, y, first, weights, acc);
  if constexpr (kGates) {
#pragma GCC unroll 16
    for (std::size_t r = 0; r < 2 * kGroup; ++r) products[r] = Simd::sum_lanes(acc[r]);
  }
}

// The records that are left when groups are whole: one at a time.
template <typename Weight>
inline void walk_record(const Weight* record, std::size_t hidden, const float* x, float* y,
                        bool first) {
  const Weight* rows[2] = {record, record + hidden};
  alignas(64) float products[2][W] = {};
  for (int r = 0; r < 2; ++r) {
    float* out = products[r];
    dot_tile_whole<1, 1>(rows + r, &x, hidden, &out, 0);
  }
  alignas(64) float a[W];
  silu_mul(products[0], products[1], a, W);
  const V weight = Simd::set1(a[0]);
  for (std::size_t h = 0; h < hidden; h += W) {
    const V sum = first ? Simd::zero() : Simd::load(y + h);
    Simd::store(y + h, Simd::fma(weight, Simd::load(record + 2 * hidden + h), sum));
  }
}

// One token: the records are walked once, front to back.
template <typename Weight>
void quantum_one_token(const Weight* records, std::size_t num_records, std::size_t hidden,
                       const float* x, float* y, bool accumulate, bool more_follows,
                       float* partial) {
  constexpr std::size_t kLanes = (kGroup + W - 1) / W * W;
  float* target = accumulate ? partial : y;
  const std::size_t num_groups = num_records / kGroup;
  const std::size_t group_size = kGroup * 3 * hidden;
  alignas(64) float a[kLanes];
  for (std::size_t g = 0; g <= num_groups && num_groups != 0; ++g) {
    const Weight* group = records + g * group_size;
    // What another thread will read must not be asked for here: look back instead of ahead.
    const bool ahead = g + 1 < num_groups || more_follows;
    const Weight* next = ahead ? group + group_size : records;
    float products[2 * kGroup];
    if (g == 0) {
      walk_group<true, false>(group, hidden, x, a, target, false, products, next);
    } else if (g < num_groups) {
      walk_group<true, true>(group, hidden, x, a, target, g == 1, products, next);
    } else {
      walk_group<false, true>(group, hidden, x, a, target, g == 1, products,
                              more_follows ? group : records);
      break;
    }
    alignas(64) float gate[kLanes] = {};
    alignas(64) float up[kLanes] = {};
    for (std::size_t i = 0; i < kGroup; ++i) {
      gate[i] = products[i];
      up[i] = products[kGroup + i];
    }
    silu_mul(gate, up, a, kLanes);
  }
  for (std::size_t i = num_groups * kGroup; i < num_records; ++i) {
    walk_record(records + i * 3 * hidden, hidden, x, target, i == 0);
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
  if (num_tokens < kConvertFromTokens) {
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
