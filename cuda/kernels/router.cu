#include "kernels/router.h"

#include <algorithm>

#include "kernels/choice.h"
#include "kernels/dot.h"
#include "kernels/dtype_dispatch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kRouteWarps = 4;

struct RouteArguments {
  const float* logits;  // (tokens, num_experts)
  std::size_t pitch;
  std::int32_t* ids;  // (tokens, slots)
  float* weights;     // (tokens, slots)
  unsigned slots;
  unsigned tokens;
  unsigned num_experts;
  ChoiceRule rule;
};

// A block routes kRouteWarps tokens; a warp one of them.
// Preconditions: those of choose(); top_k <= slots.
template <RouterKind kKind, unsigned kPerLane>
MOERUN_KERNEL route_kernel(RouteArguments a) {
  const unsigned token = block_x() * num_warps() + warp();
  if (token >= a.tokens) return;
  const Chosen chosen = choose<kKind, kPerLane>(a.logits + token * a.pitch, a.num_experts, a.rule);
  if (lane() < a.rule.top_k) {
    const std::size_t slot = std::size_t{token} * a.slots + lane();
    a.ids[slot] = static_cast<std::int32_t>(chosen.id);
    a.weights[slot] = chosen.weight;
  }
}

struct RouteSharedArguments {
  const std::byte* gate;  // (1, cols)?
  const float* x;         // (tokens, cols)
  std::size_t pitch;
  std::int32_t* ids;  // (tokens, slots)
  float* weights;     // (tokens, slots)
  unsigned slots;
  unsigned tokens;
  unsigned cols;
  std::int32_t shared_id;
};

// A block does kRouteWarps tokens; a warp one of them, lanes share the dot product with the gate.
// Preconditions: the gate's row on a 16-byte border, padded to whole packs; x too.
template <DType kDType>
MOERUN_KERNEL route_shared_kernel(RouteSharedArguments a) {
  const unsigned token = block_x() * num_warps() + warp();
  if (token >= a.tokens) return;
  float weight = 1;
  if (a.gate != nullptr) {
    float sums[1][1];
    const std::byte* rows[1] = {a.gate};
    const float* xs[1] = {a.x + token * a.pitch};
    dot_rows<kDType>(rows, xs, a.cols, sums);
    weight = 1.0f / (1.0f + expf(-nan_unless_finite(sum_over_warp(sums[0][0]))));
  }
  if (lane() == 0) {
    const std::size_t slot = std::size_t{token} * a.slots + a.slots - 1;
    a.ids[slot] = a.shared_id;
    a.weights[slot] = weight;
  }
}

struct SendArguments {
  Routing from;
  Routing to;
  std::uint32_t* flag;
  std::uint32_t value;
};

// One block copies a routing to memory of the host, then says so.
MOERUN_KERNEL send_kernel(SendArguments a) {
  const std::size_t pairs = a.from.tokens * a.from.slots;
  for (std::size_t i = thread_x(); i < pairs; i += num_threads()) {
    a.to.expert_ids[i] = a.from.expert_ids[i];
    a.to.expert_weights[i] = a.from.expert_weights[i];
  }
  sync_block();
  if (thread_x() != 0) return;
  fence_for_host();  // for the whole block, whose writes the barrier has put before it
  store_for_host(a.flag, a.value);
}

template <RouterKind kKind>
void launch_route(StreamHandle stream, const RouteArguments& arguments) {
  const LaunchShape shape{(arguments.tokens + kRouteWarps - 1) / kRouteWarps, 1, 1,
                          kRouteWarps * kWarpSize};
  if (arguments.num_experts <= 128) {
    launch<route_kernel<kKind, 4>>(stream, shape, arguments, "route");
  } else {
    launch<route_kernel<kKind, kMaxExperts / kWarpSize>>(stream, shape, arguments, "route");
  }
}

}  // namespace

void check_choice(const RouterParams& params, std::size_t num_experts, std::size_t slots) {
  if (num_experts > kMaxExperts) {
    throw InvalidArgument(message("route: ", num_experts, " experts; the CUDA router holds ",
                                  kMaxExperts, " at most"));
  }
  const std::size_t most = std::min({kMaxTopK, num_experts, slots});
  if (params.top_k > most) {
    throw InvalidArgument(message("route: top_k is ", params.top_k, "; with ", num_experts,
                                  " experts and ", slots, " slots the CUDA router takes ", most,
                                  " at most"));
  }
  if (params.kind == RouterKind::sparse_mixer && params.top_k != 2) {
    throw InvalidArgument(message("route: the sparse mixer chooses 2 experts, not ", params.top_k));
  }
}

void route(StreamHandle stream, const RouterParams& params, Activations logits, Routing routing) {
  if (logits.rows == 0) return;
  check_choice(params, logits.cols, routing.slots);
  const RouteArguments arguments{logits.data,
                                 logits.pitch,
                                 routing.expert_ids,
                                 routing.expert_weights,
                                 static_cast<unsigned>(routing.slots),
                                 static_cast<unsigned>(logits.rows),
                                 static_cast<unsigned>(logits.cols),
                                 rule_of(params)};
  switch (params.kind) {
    case RouterKind::softmax_top_k:
      return launch_route<RouterKind::softmax_top_k>(stream, arguments);
    case RouterKind::top_k_softmax:
      return launch_route<RouterKind::top_k_softmax>(stream, arguments);
    case RouterKind::sparse_mixer:
      return launch_route<RouterKind::sparse_mixer>(stream, arguments);
  }
}

void route_shared(StreamHandle stream, const MatrixView& gate, std::int32_t shared_id,
                  Activations x, Routing routing) {
  if (x.rows == 0) return;
  if (!gate.empty()) {
    check_weights(gate, "route_shared");
    check_activations(x, "route_shared");
  }
  const RouteSharedArguments arguments{gate.data,
                                       x.data,
                                       x.pitch,
                                       routing.expert_ids,
                                       routing.expert_weights,
                                       static_cast<unsigned>(routing.slots),
                                       static_cast<unsigned>(x.rows),
                                       static_cast<unsigned>(gate.cols),
                                       shared_id};
  const LaunchShape shape{(arguments.tokens + kRouteWarps - 1) / kRouteWarps, 1, 1,
                          kRouteWarps * kWarpSize};
  dispatch_dtype(gate.dtype, [&](auto dtype) {
    launch<route_shared_kernel<dtype.value>>(stream, shape, arguments, "route_shared");
  });
}

void send_routing(StreamHandle stream, const Routing& from, const Routing& to, std::uint32_t* flag,
                  std::uint32_t value) {
  launch<send_kernel>(stream, {.threads = 1024}, SendArguments{from, to, flag, value},
                      "send_routing");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
