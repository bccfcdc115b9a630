// Products of activations with a matrix of weights.
#pragma once

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

enum class Precision {
  exact,        // products and sums in float32
  tensor_cores  // many tokens: activations rounded to bf16 for bf16 weights, to tf32 for F16 ones
};

// y[t] (+)= scale * (W x[t] + bias). A token's result is the same bits beside any other tokens, as
// long as the same kernel is chosen: up to kFewTokens tokens, or more.
inline constexpr std::size_t kFewTokens = 8;
void linear(StreamHandle stream, const LinearWeights& weights, Activations x, Activations y,
            LinearOutput output, Precision precision);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
