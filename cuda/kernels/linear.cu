#include "kernels/linear.h"

#include "kernels/dtype_dispatch.h"
#include "kernels/product.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

void linear(StreamHandle stream, const LinearWeights& weights, Activations x, Activations y,
            LinearOutput output, Precision precision) {
  const MatrixView& matrix = weights.weight;
  if (x.rows == 0 || matrix.rows == 0) return;
  if (x.cols != matrix.cols || y.cols < matrix.rows || y.rows < x.rows) {
    throw InvalidArgument(message("linear: (", matrix.rows, ", ", matrix.cols, ") weights take (",
                                  x.rows, ", ", x.cols, ") activations to (", y.rows, ", ", y.cols,
                                  ")"));
  }
  check_weights(matrix, "linear");
  check_activations(x, "linear");
  const ProductArguments arguments{matrix.data,
                                   matrix.row_bytes(),
                                   weights.bias,
                                   x.data,
                                   x.pitch,
                                   y.data,
                                   y.pitch,
                                   static_cast<unsigned>(matrix.rows),
                                   static_cast<unsigned>(matrix.cols),
                                   static_cast<unsigned>(x.rows),
                                   output.scale,
                                   output.accumulate};
  if (x.rows <= kFewTokens) return launch_gemv(stream, matrix.dtype, arguments);
  if (matrix.dtype != DType::f32 && precision == Precision::tensor_cores) {
    return launch_gemm_half(stream, matrix.dtype, arguments);
  }
  launch_gemm(stream, matrix.dtype, arguments);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
