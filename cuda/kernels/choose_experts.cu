#include "kernels/choose_experts.h"

#include <algorithm>

#include "kernels/choice.h"
#include "kernels/dot.h"
#include "kernels/dtype_dispatch.h"
#include "kernels/router.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kWarps = 8;

struct Router {
  const std::byte* weight;  // (num_experts, cols)
  std::size_t row_bytes;
  const std::byte* gate;  // (1, cols)?
  const float* x;         // (1, cols)
  const float* norm_weight;
  const float* norm_bias;
  float norm_eps;
  DType dtype;
  DType gate_dtype;
  bool has_norm;
  bool subtracts_mean;
  bool has_shared;
  float* logits;
  Routing to;       // (1, slots)
  Routing on_host;  // the same, or none
  Announcement announcement;
  RouterMemory* memory;
  unsigned num_experts;
  unsigned cols;
};

struct ChooseArguments {
  Router routers[kMaxRouters];
  ChoiceRule rule;
};

// Shared memory of a block.
struct Shared {
  unsigned* is_last;
  float* warp_sums;                                       // (2, kWarps)
  float* normed;                                          // (cols)
  static constexpr std::size_t kFloats = 4 + 2 * kWarps;  // and normed

  MOERUN_DEVICE Shared()
      : is_last(shared_memory<unsigned>()),
        warp_sums(shared_memory<float>() + 4),
        normed(shared_memory<float>() + kFloats) {}
};

// x, normalised if that is asked for. The block's threads share the work.
MOERUN_DEVICE const float* input_of(const Router& router, const Shared& shared) {
  if (!router.has_norm) return router.x;
  const auto n = static_cast<float>(router.cols);
  float mean = 0;
  if (router.subtracts_mean) {
    float sum = 0;
    for (unsigned i = thread_x(); i < router.cols; i += num_threads()) sum += router.x[i];
    mean = sum_over_block(sum, shared.warp_sums) / n;
  }
  float squares = 0;
  for (unsigned i = thread_x(); i < router.cols; i += num_threads()) {
    const float value = router.x[i] - mean;
    squares = fused_multiply_add(value, value, squares);
  }
  const float variance = sum_over_block(squares, shared.warp_sums + kWarps) / n;
  const float inverse = 1.0f / sqrtf(variance + router.norm_eps);
  for (unsigned i = thread_x(); i < router.cols; i += num_threads()) {
    const float bias = router.norm_bias != nullptr ? router.norm_bias[i] : 0.0f;
    shared.normed[i] = (router.x[i] - mean) * inverse * router.norm_weight[i] + bias;
  }
  sync_block();
  return shared.normed;
}

template <DType kDType>
MOERUN_DEVICE float product_of(const std::byte* row, const float* x, unsigned cols) {
  float sums[1][1];
  const std::byte* rows[1] = {row};
  const float* xs[1] = {x};
  dot_rows<kDType>(rows, xs, cols, sums);
  return sum_over_warp(sums[0][0]);
}

MOERUN_DEVICE float product_of(DType dtype, const std::byte* row, const float* x, unsigned cols) {
  if (dtype == DType::bf16) return product_of<DType::bf16>(row, x, cols);
  if (dtype == DType::f16) return product_of<DType::f16>(row, x, cols);
  return product_of<DType::f32>(row, x, cols);
}

// A slot of the result, in both places.
MOERUN_DEVICE void write_slot(const Router& router, unsigned slot, unsigned id, float weight) {
  router.to.expert_ids[slot] = static_cast<std::int32_t>(id);
  router.to.expert_weights[slot] = weight;
  if (router.on_host.expert_ids == nullptr) return;
  router.on_host.expert_ids[slot] = static_cast<std::int32_t>(id);
  router.on_host.expert_weights[slot] = weight;
}

// Row y of the grid is a router; a warp computes the logit of one expert, or the shared gate. The
// last block of a router to come so far chooses.
// Preconditions: those of choose(); rows of weights on 16-byte borders, padded to whole packs.
template <RouterKind kKind, unsigned kPerLane>
MOERUN_KERNEL MOERUN_BOUNDS(kWarps* kWarpSize, 1) choose_kernel(ChooseArguments a) {
  const Router& router = a.routers[block_y()];
  const unsigned num_rows = router.num_experts + (router.gate != nullptr ? 1 : 0);
  const unsigned num_blocks = (num_rows + kWarps - 1) / kWarps;
  if (block_x() >= num_blocks) return;
  const Shared shared;
  const float* x = input_of(router, shared);
  const unsigned row = block_x() * kWarps + warp();
  if (row < router.num_experts) {
    const float logit =
        product_of(router.dtype, router.weight + row * router.row_bytes, x, router.cols);
    if (lane() == 0) router.logits[row] = logit;
  } else if (row < num_rows) {
    const float product = product_of(router.gate_dtype, router.gate, x, router.cols);
    if (lane() == 0) router.memory->gate = product;
  }
  sync_block();
  if (thread_x() == 0) {
    fence_for_device();  // for the whole block, whose writes the barrier has put before it
    const bool is_last = add_atomically(&router.memory->num_done, 1) + 1 == num_blocks;
    fence_for_device();
    *shared.is_last = is_last ? 1 : 0;
  }
  sync_block();
  if (*shared.is_last == 0 || warp() != 0) return;
  fence_for_device();

  const Chosen chosen = choose<kKind, kPerLane>(router.logits, router.num_experts, a.rule);
  if (lane() < a.rule.top_k) write_slot(router, lane(), chosen.id, chosen.weight);
  if (lane() == 0) {
    if (router.has_shared) {
      const float gate = load_fresh(&router.memory->gate);
      const float weight =
          router.gate != nullptr ? 1.0f / (1.0f + expf(-nan_unless_finite(gate))) : 1.0f;
      write_slot(router, static_cast<unsigned>(router.to.slots) - 1, router.num_experts, weight);
    }
    *router.memory = {};  // for the next launch
  }
  if (router.announcement.flag == nullptr) return;
  sync_warp();
  if (lane() != 0) return;
  fence_for_host();
  store_for_host(router.announcement.flag, router.announcement.value);
}

Router router_of(const RouteRequest& request) {
  check_weights(request.router, "choose_experts");
  check_activations(request.x, "choose_experts");
  if (!request.shared_gate.empty()) check_weights(request.shared_gate, "choose_experts");
  Router router{};
  router.weight = request.router.data;
  router.row_bytes = request.router.row_bytes();
  router.dtype = request.router.dtype;
  router.gate = request.has_shared ? request.shared_gate.data : nullptr;
  router.gate_dtype = request.shared_gate.dtype;
  router.has_shared = request.has_shared;
  router.x = request.x.data;
  if (request.norm != nullptr) {
    router.has_norm = true;
    router.subtracts_mean = request.norm->kind == NormKind::layer;
    router.norm_weight = request.norm->weight;
    router.norm_bias = router.subtracts_mean ? request.norm->bias : nullptr;
    router.norm_eps = request.norm->eps;
  }
  router.logits = request.logits.data;
  router.to = request.routing;
  router.on_host = request.on_host;
  router.num_experts = static_cast<unsigned>(request.router.rows);
  router.cols = static_cast<unsigned>(request.router.cols);
  return router;
}

template <RouterKind kKind>
void launch_kind(StreamHandle stream, const LaunchShape& shape, const ChooseArguments& arguments,
                 std::size_t most_experts) {
  if (most_experts <= 128) {
    launch<choose_kernel<kKind, 4>>(stream, shape, arguments, "choose_experts");
  } else {
    launch<choose_kernel<kKind, kMaxExperts / kWarpSize>>(stream, shape, arguments,
                                                          "choose_experts");
  }
}

}  // namespace

bool is_one_choice(const RouteRequest& request) {
  return request.x.rows == 1 && !request.router.empty();
}

void choose_experts(StreamHandle stream, const RouterParams& params,
                    std::span<const RouteRequest> requests, RouterMemory* memory,
                    std::span<const Announcement> announcements) {
  if (requests.empty()) return;
  if (requests.size() > kMaxRouters) {
    throw InvalidArgument(message("choose_experts: ", requests.size(), " routers at once; at most ",
                                  kMaxRouters, " are possible"));
  }
  ChooseArguments arguments{};
  arguments.rule = rule_of(params);
  std::size_t most_experts = 0;
  std::size_t most_cols = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    check_choice(params, requests[i].router.rows, requests[i].routing.slots);
    arguments.routers[i] = router_of(requests[i]);
    arguments.routers[i].memory = memory + i;
    if (requests[i].on_host.expert_ids != nullptr) {
      arguments.routers[i].announcement = announcements[i];
    }
    most_experts = std::max(most_experts, requests[i].router.rows);
    most_cols = std::max(most_cols, requests[i].router.cols);
  }
  const LaunchShape shape{.blocks_x = static_cast<unsigned>((most_experts + kWarps) / kWarps),
                          .blocks_y = static_cast<unsigned>(requests.size()),
                          .threads = kWarps * kWarpSize,
                          .shared_bytes = (Shared::kFloats + most_cols) * sizeof(float)};
  switch (params.kind) {
    case RouterKind::softmax_top_k:
      return launch_kind<RouterKind::softmax_top_k>(stream, shape, arguments, most_experts);
    case RouterKind::top_k_softmax:
      return launch_kind<RouterKind::top_k_softmax>(stream, shape, arguments, most_experts);
    case RouterKind::sparse_mixer:
      return launch_kind<RouterKind::sparse_mixer>(stream, shape, arguments, most_experts);
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
