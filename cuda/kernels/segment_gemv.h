// Experts for few tokens: every record is read once, by dot products in float32.
#pragma once

#include "kernels/launch.h"
#include "kernels/segment_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Partial sums of `segments` (num_segments, device memory, at most max_records each) for every
// token that uses them. Right for any number of tokens, fast for up to 8 that share an expert. A
// token's sums do not depend on how experts are cut, on the order of segments, or on other tokens.
// Not for folded work.
void compute_segments_few(StreamHandle stream, const ExpertWork& work,
                          const DeviceSegment* segments, std::size_t num_segments,
                          std::size_t max_records);

// The same for a layer whose experts are all in memory: `experts` holds each whole, by its id, and
// the device looks up what the routing names.
void compute_experts_few(StreamHandle stream, const ExpertWork& work, const DeviceSegment* experts,
                         std::size_t max_records);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
