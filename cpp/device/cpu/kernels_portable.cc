// The kernel set for any processor: four lanes in the compiler's vector type, which every target
// has registers for. Multiplication and addition are rounded apart (-ffp-contract=off).
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "device/cpu/kernel_table.h"

namespace moerun {
namespace {

#include "device/cpu/kernels_simd.h"

struct Portable {
  typedef float V __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  typedef std::uint32_t U __attribute__((vector_size(16)));
  static constexpr std::size_t kWidth = 4;
  static constexpr int kDotRows = 2;
  static constexpr int kDotTokens = 4;
  static constexpr int kDirectTiles = 2;  // of tokens, from which on weights are converted first
  static constexpr int kOneTokenRecords = 2;  // whose gate and up rows one token passes together
  static constexpr int kSumTokens = 4;
  static constexpr int kSumVectors = 2;

  static V zero() { return V{0, 0, 0, 0}; }
  static V set1(float x) { return V{x, x, x, x}; }
  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static V load(const BFloat* p) {
    const U bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    return reinterpret_cast<V>(bits << 16);
  }
  static V load(const Half* p) {
    return V{f16_to_float(p[0].bits), f16_to_float(p[1].bits), f16_to_float(p[2].bits),
             f16_to_float(p[3].bits)};
  }
  template <typename Weight, std::size_t kParts>
  static inline __attribute__((always_inline)) void load_line(const Weight* p, V (&parts)[kParts]) {
    load_line_by_parts<Portable>(p, parts);
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V min(V a, V b) { return a < b ? a : b; }
  static V max(V a, V b) { return a > b ? a : b; }
  static V round(V a) {
    const V shift = set1(12582912.0f);  // 1.5 * 2^23: adding it leaves no bits for a fraction
    return (a + shift) - shift;
  }
  static V scale_by_power_of_two(V a, V n) {
    const I exponent = __builtin_convertvector(n, I);
    return a * reinterpret_cast<V>((exponent + 127) << 23);
  }
  static float sum_lanes(V v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void sum_lanes_of_vectors(const float* vectors, float* sums) {
    sum_lanes_one_by_one<Portable>(vectors, sums);
  }
};
using Simd = Float32Dots<Portable>;

#include "device/cpu/kernels_vector.h"
//
#include "device/cpu/kernels_dot.h"
//
#include "device/cpu/kernels_sum.h"
//
#include "device/cpu/kernels_segment.h"
//
#include "device/cpu/kernels_entry.h"

constexpr CpuKernels kKernels = make_kernels("portable");

}  // namespace

const CpuKernels* cpu_kernels_portable() { return &kKernels; }

}  // namespace moerun
