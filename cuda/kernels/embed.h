// Rows of the embedding table.
#pragma once

#include <cstdint>

#include "base/view.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// out[t] = scale * table[token_ids[t]] for the out.rows ids, which are in range.
void embed(StreamHandle stream, const MatrixView& table, const std::int32_t* token_ids, float scale,
           Activations out);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
