// The end of a layer's experts: partial sums are added up in a fixed order.
#pragma once

#include "kernels/launch.h"
#include "kernels/segment_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// y[t] += scale * sum over slots s of weight(t, s) * expert(t, s), in slot order; an expert is
// (P_0 + P_1) + P_2 ... over its quanta. y (tokens, hidden_size).
void sum_experts(StreamHandle stream, const ExpertWork& work, float scale, Activations y);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
