// Normalisation of rows, by itself and after adding to the residual stream.
#pragma once

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// out[t] = norm(x[t]); out may be x.
void norm(StreamHandle stream, const NormWeights& weights, Activations x, Activations out);

// x[t] += delta[t]; out[t] = norm(x[t]).
void add_norm(StreamHandle stream, const NormWeights& weights, Activations delta, Activations x,
              Activations out);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
