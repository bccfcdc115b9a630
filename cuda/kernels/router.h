// From router logits to the experts of every token and their weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/op_params.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Fills the first top_k slots of every token of `logits` (tokens, num_experts): ids by falling
// score (of equals the lower id), and weights. InvalidArgument beyond the limits above.
void route(StreamHandle stream, const RouterParams& params, Activations logits, Routing routing);

// Fills the last slot: the shared expert, weighted by sigmoid(gate . x), or by 1 without a gate.
void route_shared(StreamHandle stream, const MatrixView& gate, std::int32_t shared_id,
                  Activations x, Routing routing);

// Throws InvalidArgument for what route() cannot do (kernels/choice.h has the limits).
void check_choice(const RouterParams& params, std::size_t num_experts, std::size_t slots);

// Copies to memory that the host shares, then sets the flag there.
void send_routing(StreamHandle stream, const Routing& from, const Routing& to, std::uint32_t* flag,
                  std::uint32_t value);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
