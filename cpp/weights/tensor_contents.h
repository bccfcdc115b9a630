// Contents of a tensor of a checkpoint, read block by block: for questions that its header cannot
// answer.
#pragma once

#include <cstdint>
#include <optional>

#include "io/checkpoint.h"

namespace moerun {

// Whether two tensors of one shape hold the same bits. False where their dtypes differ. Reads no
// further than to the first difference.
bool is_same_data(const TensorRef& a, const TensorRef& b);

// An element that is NaN or infinite.
struct NonFinite {
  std::uint64_t element = 0;  // its index, rows first
  float value = 0;
};
// The first one in the file's order; none in a tensor that is no F32, F16 or BF16.
std::optional<NonFinite> find_non_finite(const TensorRef& tensor);
// The same among `count` elements from `first` on.
std::optional<NonFinite> find_non_finite(const TensorRef& tensor, std::uint64_t first,
                                         std::uint64_t count);

}  // namespace moerun
