// The inner loops of the CPU backend, once per instruction set, behind plain function pointers.
//
// All sets compute the same formulas; each alone defines an exact order of floating-point
// operations, which depends neither on how many tokens are computed together nor on how the work
// is cut. Pointers are to rows of padded(n) elements, on 64-byte borders, the excess being zero.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace moerun {

// Scratch memory one thread needs for any kernel below, in bytes.
inline constexpr std::size_t kKernelScratchBytes = std::size_t{2} << 20;
// The most tokens of one call; callers cut longer lists.
inline constexpr std::size_t kMaxTokens = 120;

struct CpuKernels {
  std::string_view name;

  // outs[t][r] = rows[r] . xs[t], for num_rows rows that lie `row_stride` bytes apart. k is a
  // multiple of kRowQuantum; num_tokens <= kMaxTokens.
  void (*dot)(DType dtype, const std::byte* rows, std::size_t row_stride, std::size_t num_rows,
              std::size_t k, const float* const* xs, float* const* outs, std::size_t num_tokens,
              std::byte* scratch);

  // One quantum (num_records <= kQuantumRecords) of an expert, for each token:
  //   ys[t] (+)= sum_i down_i * (silu(gate_i . xs[t]) * (up_i . xs[t]))
  // `records` is (num_records, 3, hidden); the sum is formed first, then stored or added.
  // more_follows: the caller goes on with what lies behind in memory, so it may be fetched ahead.
  void (*segment_quantum)(DType dtype, const std::byte* records, std::size_t num_records,
                          std::size_t hidden, const float* const* xs, float* const* ys,
                          std::size_t num_tokens, bool accumulate, bool more_follows,
                          std::byte* scratch);

  // outs[t] = sum_j weights[t][j] * rows[j], j = 0..num_rows-1 in that order; float32 rows of n.
  void (*weighted_sum)(const float* rows, std::size_t row_stride_floats, std::size_t num_rows,
                       std::size_t n, const float* const* weights, float* const* outs,
                       std::size_t num_tokens);

  // x[i] = exp(scale * x[i] - max) / sum, for i in [0, n), or NaN if any x[i] is not finite. n need
  // not be a multiple of anything, but the row's memory must reach to the next multiple of 16
  // floats.
  void (*softmax)(float* x, std::size_t n, float scale);

  // out = x / rms(x) * weight, and out = (x - mean) / std * weight + bias (bias may be null);
  // over n elements, rows padded to a multiple of 16 floats with zeros in x.
  void (*rms_norm)(const float* x, const float* weight, float eps, float* out, std::size_t n);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, float* out,
                     std::size_t n);

  // y[i] = w * x[i], or y[i] += w * x[i]; n a multiple of 16.
  void (*scale)(float w, const float* x, float* y, std::size_t n, bool accumulate);

  // Some sum of all n elements, as fast as they can be read: the bound of every kernel above. n a
  // multiple of 64.
  float (*read_all)(const float* x, std::size_t n);
};

// The sets this build contains, best first; those after the first supported one are fallbacks.
std::vector<std::string> compiled_cpu_kernels();
// The sets this processor can run, best first.
std::vector<std::string> supported_cpu_kernels();
// The set called `name`, or with "auto" the one that is fastest here. Throws InvalidArgument for a
// name that is unknown or that this processor cannot run.
const CpuKernels& choose_cpu_kernels(std::string_view name);

// Defined in one file each, or null where the compiler does not target that instruction set.
const CpuKernels* cpu_kernels_portable();
const CpuKernels* cpu_kernels_avx2();
const CpuKernels* cpu_kernels_avx512();
const CpuKernels* cpu_kernels_avx512_bf16();

}  // namespace moerun
