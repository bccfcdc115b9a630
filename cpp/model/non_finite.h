// Names the damaged weight when a pass computes NaN or infinity.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "weights/model_config.h"
#include "weights/model_weights.h"

namespace moerun {

// Where a pass met the first NaN or infinity.
struct NonFinitePlace {
  enum class Part {
    embedding,    // of one of its tokens
    layer,        // in this layer
    up_to_layer,  // in this layer or one before it: a device tells no more
    head,         // in the final norm or the logits
    anywhere      // in the logits of a device
  };
  Part part = Part::anywhere;
  std::size_t layer = 0;
};

// Searches the checkpoint's tensors of that place for NaN and infinities, the small ones first, and
// throws a FormatError that names layer and tensor; or that says that the activations overflowed,
// where every weight is a number.
[[noreturn]] void refuse_non_finite(const ModelConfig& config, const ModelWeights& weights,
                                    std::span<const std::int32_t> token_ids,
                                    const NonFinitePlace& place);

}  // namespace moerun
