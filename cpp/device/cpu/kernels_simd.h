// The element types of weights as kernels see them, and the dot products of sets that multiply in
// float32. Included like kernels_dot.h, before `Simd` is defined.

struct BFloat {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

// How one step of a dot product loads its operands: `kStep` elements of a weight row and of a token
// row. `Loader` is the set's vector operations, which convert any weight to float32 lanes.
template <typename Loader, typename Weight>
struct Float32DotWeight {
  static constexpr std::size_t kStep = Loader::kWidth;
  typename Loader::V lanes;
  inline __attribute__((always_inline)) void load(const Weight* p) { lanes = Loader::load(p); }
};

template <typename Loader>
struct Float32DotInput {
  typename Loader::V lanes;
  inline __attribute__((always_inline)) void load(const float* p) { lanes = Loader::load(p); }
};

// One cache line of a weight row, and the token's elements that meet it. One token streams its
// weights from memory, so the line is its step.
template <typename Weight>
constexpr std::size_t kLine = 64 / sizeof(Weight);

template <typename Loader, typename Weight>
struct Float32Line {
  static constexpr std::size_t kParts = kLine<Weight> / Loader::kWidth;
  typename Loader::V part[kParts];
  inline __attribute__((always_inline)) void load(const Weight* p) { Loader::load_line(p, part); }
};

template <typename Loader, typename Weight>
struct Float32LineInput {
  static constexpr std::size_t kParts = kLine<Weight> / Loader::kWidth;
  typename Loader::V part[kParts];
  inline __attribute__((always_inline)) void load(const float* p) {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kParts; ++i) part[i] = Loader::load(p + i * Loader::kWidth);
  }
};

// parts = the line at p, in order, for sets without a better way.
template <typename Loader, typename Weight, std::size_t kParts>
inline __attribute__((always_inline)) void load_line_by_parts(const Weight* p,
                                                              typename Loader::V (&parts)[kParts]) {
#pragma GCC unroll 8
  for (std::size_t i = 0; i < kParts; ++i) parts[i] = Loader::load(p + i * Loader::kWidth);
}

// A row of weights as float32: converted into `block`, or where it is.
template <typename Loader, typename Weight>
inline const float* float32_block(const Weight* row, float* block, std::size_t n) {
  for (std::size_t i = 0; i < n; i += Loader::kWidth) {
    Loader::store(block + i, Loader::load(row + i));
  }
  return block;
}

template <typename Loader>
inline const float* float32_block(const float* row, float*, std::size_t) {
  return row;
}

// sums[i] = sum_lanes(vectors[i]) for as many vectors as one has lanes.
template <typename Vectors>
inline void sum_lanes_one_by_one(const float* vectors, float* sums) {
  for (std::size_t i = 0; i < Vectors::kWidth; ++i) {
    sums[i] = Vectors::sum_lanes(Vectors::load(vectors + i * Vectors::kWidth));
  }
}

// Completes a set of vector operations to one whose dot products multiply in float32, whatever the
// weights are.
template <typename Vectors>
struct Float32Dots : Vectors {
  template <typename Weight>
  using DotWeight = Float32DotWeight<Vectors, Weight>;
  template <typename Weight>
  using DotInput = Float32DotInput<Vectors>;
  template <typename Weight>
  using LineWeight = Float32Line<Vectors, Weight>;
  template <typename Weight>
  using LineInput = Float32LineInput<Vectors, Weight>;
  template <typename Weight>
  using BlockedWeight = float;

  template <typename W, typename X>
  static inline __attribute__((always_inline)) typename Vectors::V dot_step(typename Vectors::V acc,
                                                                            const W& w,
                                                                            const X& x) {
    return Vectors::fma(w.lanes, x.lanes, acc);
  }
  template <typename Weight>
  static inline __attribute__((always_inline)) typename Vectors::V line_step(
      typename Vectors::V acc, const Float32Line<Vectors, Weight>& w,
      const Float32LineInput<Vectors, Weight>& x) {
#pragma GCC unroll 8
    for (std::size_t i = 0; i < w.kParts; ++i) acc = Vectors::fma(w.part[i], x.part[i], acc);
    return acc;
  }
  template <typename Weight>
  static const float* to_block(const Weight* row, float* block, std::size_t n) {
    return float32_block<Vectors>(row, block, n);
  }
};
