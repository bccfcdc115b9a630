// Experts of many tokens in float32.
#pragma once

#include "kernels/launch.h"
#include "kernels/pair_groups.h"
#include "kernels/segment_list.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Partial sums of those of `segments` that are F32. Same numbers as compute_segments_few().
void compute_segments_plain(StreamHandle stream, const ExpertWork& work,
                            const DeviceSegment* segments, std::size_t num_segments,
                            std::size_t max_records, const PairGroups& groups);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
