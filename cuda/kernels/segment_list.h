// What the expert kernels share: the list of segments, a layer's work, and where partial sums lie.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device/op_params.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// A Segment as the device sees it.
struct DeviceSegment {
  const std::byte* records = nullptr;  // (num_records, 3, padded(hidden_size))
  std::int32_t expert = 0;
  std::int32_t first_record = 0;
  std::int32_t num_records = 0;
  std::int32_t dtype = 0;  // a DType
};

// The experts of a layer, for all the launches that compute them. `partials` takes partial_floats()
// numbers; what has been computed of a (token, slot) pair lies in rows of padded(hidden_size):
//   (pairs, quanta, padded(hidden_size)), a row for each quantum of the pair's expert, or
//   (pairs, padded(hidden_size)) where is_folded: quanta are added up as they come.
// Folding wants the segments of an expert in rising order of records, over launches and within the
// list of one, and only compute_segments_many() does it. It takes a fraction of the memory: with
// many tokens, sums by quantum are larger than all the experts of a layer.
struct ExpertWork {
  ExpertShape shape;
  Activations x;  // (tokens, hidden_size)
  Routing routing;
  float* partials = nullptr;
  bool is_folded = false;
};

inline bool uses(const ExpertShape& shape, DType dtype) {
  return shape.dtype == dtype ||
         (shape.shared_intermediate_size != 0 && shape.shared_dtype == dtype);
}

inline std::size_t num_quanta(std::size_t records) {
  return (records + kQuantumRecords - 1) / kQuantumRecords;
}

// Rows of partial sums that a pair has.
inline std::size_t sums_per_pair(const ExpertShape& shape, bool is_folded) {
  if (is_folded) return 1;
  return num_quanta(std::max(shape.intermediate_size, shape.shared_intermediate_size));
}

inline std::size_t partial_floats(const ExpertShape& shape, std::size_t tokens, std::size_t slots,
                                  bool is_folded = false) {
  return tokens * slots * sums_per_pair(shape, is_folded) * padded(shape.hidden_size);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
