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
  using BlockedWeight = float;

  template <typename W, typename X>
  static inline __attribute__((always_inline)) typename Vectors::V dot_step(typename Vectors::V acc,
                                                                            const W& w,
                                                                            const X& x) {
    return Vectors::fma(w.lanes, x.lanes, acc);
  }
  template <typename Weight>
  static const float* to_block(const Weight* row, float* block, std::size_t n) {
    return float32_block<Vectors>(row, block, n);
  }
};
