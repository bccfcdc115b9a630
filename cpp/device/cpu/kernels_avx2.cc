// The kernel set for processors with AVX2, FMA and F16C.
#include "device/cpu/kernel_table.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <cstddef>

namespace moerun {
namespace {

#include "device/cpu/kernels_simd.h"

struct Avx2 {
  using V = __m256;
  static constexpr std::size_t kWidth = 8;
  static constexpr int kDotRows = 3;  // 3 x 4 accumulators, 3 weights and 1 input: 16 registers
  static constexpr int kDotTokens = 4;
  static constexpr int kDirectTiles = 5;  // of tokens, from which on weights are converted first
  static constexpr int kOneTokenRecords = 2;  // whose gate and up rows one token passes together
  static constexpr int kSumTokens = 4;
  static constexpr int kSumVectors = 2;

  static V zero() { return _mm256_setzero_ps(); }
  static V set1(float x) { return _mm256_set1_ps(x); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const BFloat* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static V load(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <typename Weight, std::size_t kParts>
  static inline __attribute__((always_inline)) void load_line(const Weight* p, V (&parts)[kParts]) {
    load_line_by_parts<Avx2>(p, parts);
  }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V scale_by_power_of_two(V a, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static float sum_lanes(V v) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
  static void sum_lanes_of_vectors(const float* vectors, float* sums) {
    sum_lanes_one_by_one<Avx2>(vectors, sums);
  }
};
using Simd = Float32Dots<Avx2>;

#include "device/cpu/kernels_vector.h"
//
#include "device/cpu/kernels_dot.h"
//
#include "device/cpu/kernels_sum.h"
//
#include "device/cpu/kernels_segment.h"
//
#include "device/cpu/kernels_entry.h"

constexpr CpuKernels kKernels = make_kernels("avx2");

}  // namespace

const CpuKernels* cpu_kernels_avx2() { return &kKernels; }

}  // namespace moerun

#else

namespace moerun {
const CpuKernels* cpu_kernels_avx2() { return nullptr; }
}  // namespace moerun

#endif
