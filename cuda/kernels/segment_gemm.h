// Experts for many tokens: grouped matrix products over the list of segments.
#pragma once

#include "kernels/launch.h"
#include "kernels/segment_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Scratch memory that compute_segments_many() needs, in bytes.
std::size_t grouping_bytes(const ExpertShape& shape, std::size_t tokens, std::size_t slots);

// As compute_segments_few(), and folded where the work is. Weights of 16 bits are multiplied by
// tensor cores: x and silu(gate . x) * (up . x) are rounded, to bf16 for bf16 weights and to tf32
// for F16 ones, and sums are float32. F32 weights are multiplied in float32. A token's sums do not
// depend on how experts are cut, on the order of experts, or on other tokens. `scratch` (device
// memory, on a 256-byte border) is used until the kernels have run.
void compute_segments_many(StreamHandle stream, const ExpertWork& work,
                           const DeviceSegment* segments, std::size_t num_segments,
                           std::size_t max_records, std::byte* scratch, std::size_t scratch_bytes);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
