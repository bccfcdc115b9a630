// From the arguments of an operation to its kernel: the dtype as a constant, and what all matrices
// of weights must fulfil. For launchers, not for device code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/error.h"
#include "base/view.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Calls body with a constant whose `value` is the dtype.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(std::integral_constant<DType, DType::f32>{});
    case DType::f16:
      return body(std::integral_constant<DType, DType::f16>{});
    case DType::bf16:
      return body(std::integral_constant<DType, DType::bf16>{});
  }
}

inline bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// Kernels load 16 bytes of weights at a time, the last of a row included.
inline void check_weights(const MatrixView& matrix, const char* operation) {
  if (is_aligned(matrix.data, 16) && matrix.pitch % kRowQuantum == 0 &&
      matrix.pitch >= matrix.cols && matrix.cols < (1u << 30)) {
    return;
  }
  throw InvalidArgument(message(operation, ": weights of ", matrix.cols,
                                " columns with a pitch of ", matrix.pitch, " (a multiple of ",
                                kRowQuantum, " is needed, on a 16-byte border)"));
}

// ... and four activations.
inline void check_activations(const Activations& x, const char* operation) {
  if (is_aligned(x.data, 16) && x.pitch % 4 == 0 && x.pitch >= x.cols) return;
  throw InvalidArgument(message(operation, ": activations of ", x.cols, " columns with a pitch of ",
                                x.pitch, " (a multiple of 4 is needed, on a 16-byte border)"));
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
