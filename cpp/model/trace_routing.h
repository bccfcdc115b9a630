// Runs a sequence and keeps which experts its tokens used.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "model/sampler.h"
#include "model/session.h"
#include "trace/routing_record.h"

namespace moerun {

// The routing of given tokens, all computed at once.
RoutingRecord trace_routing(const std::shared_ptr<Model>& model,
                            std::span<const std::int32_t> token_ids,
                            const RoutingRecordOptions& options,
                            const Checkpointer& between_layers = {});

// The routing of `num_tokens` tokens that are decoded after a prompt, whose own is not recorded. No
// token ends the text. InvalidArgument where they do not fit in the context.
RoutingRecord trace_decoding(const std::shared_ptr<Model>& model,
                             std::span<const std::int32_t> prompt, std::size_t num_tokens,
                             const SamplingParams& sampling, const RoutingRecordOptions& options,
                             const Checkpointer& between_layers = {});

}  // namespace moerun
