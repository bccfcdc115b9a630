// Logits of a whole sequence at once.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "model/session.h"

namespace moerun {

// `logits` has (token_ids.size(), vocab_size) floats. FormatError where one is not finite.
void forward(const std::shared_ptr<Model>& model, std::span<const std::int32_t> token_ids,
             std::span<float> logits, const Checkpointer& between_layers = {});

// The same, but NaN and infinity stay in the logits. Returns the message of the FormatError that
// forward() throws for them; empty where every logit is finite.
std::string forward_with_non_finite(const std::shared_ptr<Model>& model,
                                    std::span<const std::int32_t> token_ids,
                                    std::span<float> logits,
                                    const Checkpointer& between_layers = {});

}  // namespace moerun
