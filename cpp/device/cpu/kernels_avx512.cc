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

using Simd = Float32Dots<Avx512>;

#include "device/cpu/kernels_vector.h"
//
#include "device/cpu/kernels_dot.h"
//
#include "device/cpu/kernels_sum.h"
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
