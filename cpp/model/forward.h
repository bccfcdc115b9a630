// Logits of a whole sequence at once.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "model/session.h"

namespace moerun {

// `logits` has (token_ids.size(), vocab_size) floats.
void forward(const std::shared_ptr<Model>& model, std::span<const std::int32_t> token_ids,
             std::span<float> logits, const Checkpointer& between_layers = {});

}  // namespace moerun
