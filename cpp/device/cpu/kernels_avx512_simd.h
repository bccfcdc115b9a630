// What the two AVX-512 kernel sets share. Included like kernels_dot.h.

struct Avx512 {
  using V = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr int kDotRows = 4;  // 4 x 6 accumulators, 4 weights, 1 input: 29 of 32 registers
  static constexpr int kDotTokens = 6;
  static constexpr int kDirectTiles = 5;  // of tokens, from which on weights are converted first
  static constexpr int kOneTokenRecords = 2;  // whose gate and up rows one token passes together
  static constexpr int kSumTokens = 6;
  static constexpr int kSumVectors = 4;

  static V zero() { return _mm512_setzero_ps(); }
  static V set1(float x) { return _mm512_set1_ps(x); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const BFloat* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return widen<0>(_mm512_castsi256_si512(bits));
  }
  static V load(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  template <typename Weight, std::size_t kParts>
  static inline __attribute__((always_inline)) void load_line(const Weight* p, V (&parts)[kParts]) {
    load_line_by_parts<Avx512>(p, parts);
  }
  static inline __attribute__((always_inline)) void load_line(const BFloat* p, V (&parts)[2]) {
    const __m512i bits = _mm512_loadu_si512(p);
    parts[0] = widen<0>(bits);
    parts[1] = widen<1>(bits);
  }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }
  static V round(V a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static V scale_by_power_of_two(V a, V n) { return _mm512_scalef_ps(a, n); }
  static float sum_lanes(V v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  // sums[i] = sum_lanes(vectors[i]) for 16 vectors: the additions of sum_lanes in its order, each
  // step for several vectors at once.
  static void sum_lanes_of_vectors(const float* vectors, float* sums) {
    __m512 quarters[4];  // of vectors 4q ... 4q + 3: four lanes each
    for (int q = 0; q < 4; ++q) {
      const float* v = vectors + q * 4 * kWidth;
      const __m512 ab = halves(load(v), load(v + kWidth));
      const __m512 cd = halves(load(v + 2 * kWidth), load(v + 3 * kWidth));
      quarters[q] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0b10001000),
                                  _mm512_shuffle_f32x4(ab, cd, 0b11011101));
    }
    const __m512 low = pairs(quarters[0], quarters[1]);
    const __m512 high = pairs(quarters[2], quarters[3]);
    const __m512 mixed = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0b01000100),
                                       _mm512_shuffle_ps(low, high, 0b11101110));
    // Lane 4i + j now holds the sum of vector 4j + i.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    store(sums, _mm512_permutexvar_ps(order, mixed));
  }

 private:
  // 16 of the 32 bf16 numbers as float32: one instruction moves each to the upper half of a lane
  // and clears the lower one.
  template <int half>
  static inline __attribute__((always_inline)) V widen(__m512i bits) {
    constexpr int f = half * 16;
    const __m512i source = _mm512_set_epi16(f + 15, 0, f + 14, 0, f + 13, 0, f + 12, 0, f + 11, 0,
                                            f + 10, 0, f + 9, 0, f + 8, 0, f + 7, 0, f + 6, 0,
                                            f + 5, 0, f + 4, 0, f + 3, 0, f + 2, 0, f + 1, 0, f, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, source, bits));
  }

  // The upper half added to the lower one, of a and of b.
  static V halves(V a, V b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0b01000100),
                         _mm512_shuffle_f32x4(a, b, 0b11101110));
  }
  // In every group of four lanes: a0 + a2, b0 + b2, a1 + a3, b1 + b3.
  static V pairs(V a, V b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
};
