// From logits to the most likely token.
#pragma once

#include <cstdint>

#include "base/view.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// ids[t] = the column of the largest logit of row t, of equals the lower one; -1 where
// a logit of the row is not finite.
void argmax(StreamHandle stream, Activations logits, std::int32_t* ids);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
