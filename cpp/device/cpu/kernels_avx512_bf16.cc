// The kernel set for processors with AVX512-BF16: dot products of bf16 weights by vdpbf16ps.
//
// That instruction takes both operands as bf16. A token's value x is therefore given as two of
// them, high = bf16(x) and low = bf16(x - high), which keeps 16 of its 24 mantissa bits; the
// product with each is summed in float32. Everything else is the AVX-512 set.
#include "device/cpu/kernel_table.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>

#include <cstddef>

namespace moerun {
namespace {

#include "device/cpu/kernels_simd.h"
//
#include "device/cpu/kernels_avx512_simd.h"

struct BFloatPairs {
  static constexpr std::size_t kStep = 32;
  __m512bh pairs;
  inline __attribute__((always_inline)) void load(const BFloat* p) {
    pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  }
};

struct SplitInput {
  __m512bh high;
  __m512bh low;
  inline __attribute__((always_inline)) void load(const float* p) {
    const __m512 first = _mm512_loadu_ps(p);
    const __m512 second = _mm512_loadu_ps(p + 16);
    high = _mm512_cvtne2ps_pbh(second, first);
    const auto bits = reinterpret_cast<__m512i>(high);
    low = _mm512_cvtne2ps_pbh(_mm512_sub_ps(second, widen(_mm512_extracti64x4_epi64(bits, 1))),
                              _mm512_sub_ps(first, widen(_mm512_castsi512_si256(bits))));
  }
  static inline __attribute__((always_inline)) __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

template <typename Weight>
struct DotTypes {
  using Row = Float32DotWeight<Avx512, Weight>;
  using Input = Float32DotInput<Avx512>;
  using Line = Float32Line<Avx512, Weight>;
  using LineInput = Float32LineInput<Avx512, Weight>;
  using Block = float;
};

template <>
struct DotTypes<BFloat> {
  using Row = BFloatPairs;
  using Input = SplitInput;
  using Line = BFloatPairs;
  using LineInput = SplitInput;
  using Block = BFloat;
};

struct Simd : Float32Dots<Avx512> {
  using Float32Dots<Avx512>::dot_step;
  using Float32Dots<Avx512>::line_step;
  using Float32Dots<Avx512>::to_block;
  template <typename Weight>
  using DotWeight = typename DotTypes<Weight>::Row;
  template <typename Weight>
  using DotInput = typename DotTypes<Weight>::Input;
  template <typename Weight>
  using LineWeight = typename DotTypes<Weight>::Line;
  template <typename Weight>
  using LineInput = typename DotTypes<Weight>::LineInput;
  template <typename Weight>
  using BlockedWeight = typename DotTypes<Weight>::Block;

  static inline __attribute__((always_inline)) V dot_step(V acc, const BFloatPairs& w,
                                                          const SplitInput& x) {
    return _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc, x.high, w.pairs), x.low, w.pairs);
  }
  static inline __attribute__((always_inline)) V line_step(V acc, const BFloatPairs& w,
                                                           const SplitInput& x) {
    return dot_step(acc, w, x);
  }
  static const BFloat* to_block(const BFloat* row, float*, std::size_t) { return row; }
};

#include "device/cpu/kernels_vector.h"
//
#include "device/cpu/kernels_dot.h"
//
#include "device/cpu/kernels_sum.h"
//
#include "device/cpu/kernels_segment.h"
//
#include "device/cpu/kernels_entry.h"

constexpr CpuKernels kKernels = make_kernels("avx512_bf16");

}  // namespace

const CpuKernels* cpu_kernels_avx512_bf16() { return &kKernels; }

}  // namespace moerun

#else

namespace moerun {
const CpuKernels* cpu_kernels_avx512_bf16() { return nullptr; }
}  // namespace moerun

#endif
