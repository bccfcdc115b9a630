// The kernel set for processors with AVX-512 F, BW, DQ and VL.
#include "device/cpu/kernel_table.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

#include <immintrin.h>

#include <cstddef>

namespace moerun {
namespace {

#include "device/cpu/kernels_simd.h"
//
#include "device/cpu/kernels_avx512_simd.h"

struct Simd : Avx512 {
  template <typename Weight>
  using DotWeight = Float32DotWeight<Avx512, Weight>;
  template <typename Weight>
  using DotInput = Float32DotInput<Avx512>;
  template <typename Weight>
  using BlockedWeight = float;
  template <typename W, typename X>
  static inline __attribute__((always_inline)) V dot_step(V acc, const W& w, const X& x) {
    return fma(w.lanes, x.lanes, acc);
  }
  template <typename Weight>
  static const float* to_block(const Weight* row, float* block, std::size_t n) {
    return float32_block<Avx512>(row, block, n);
  }
};

#include "device/cpu/kernels_vector.h"
//
#include "device/cpu/kernels_dot.h"
//
#include "device/cpu/kernels_segment.h"
//
#include "device/cpu/kernels_entry.h"

constexpr CpuKernels kKernels = make_kernels("avx512");

}  // namespace

const CpuKernels* cpu_kernels_avx512() { return &kKernels; }

}  // namespace moerun

#else

namespace moerun {
const CpuKernels* cpu_kernels_avx512() { return nullptr; }
}  // namespace moerun

#endif
