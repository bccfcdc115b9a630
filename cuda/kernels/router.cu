#include "kernels/router.h"

#include <algorithm>
#include <cfloat>

#include "kernels/best.h"
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
  unsigned top_k;
  bool norm_topk_prob;
  float jitter;
};

// The scores of one token, spread over a warp: lane l holds experts l, l + 32, ...
template <unsigned kPerLane>
struct Scores {
  float at[kPerLane];
  unsigned num_experts;
  unsigned taken = 0;  // a bit for each of the lane's experts that has been chosen

  MOERUN_DEVICE static unsigned id_of(unsigned i) { return i * kWarpSize + lane(); }
  MOERUN_DEVICE bool is_candidate(unsigned i) const {
    return id_of(i) < num_experts && (taken >> i & 1) == 0;
  }

  MOERUN_DEVICE void load(const float* logits) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      at[i] = -FLT_MAX;
      if (id_of(i) < num_experts) {
        const float score = logits[id_of(i)];
        // A score that is not a number would make every comparison false.
        at[i] = score == score ? score : -FLT_MAX;
      }
    }
  }

  // The best that has not been taken, which is then taken. Of no candidates: id kNone.
  MOERUN_DEVICE Best take_best() {
    Best best{-INFINITY, kNone};
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      if (is_candidate(i)) best = better(best, {at[i], id_of(i)});
    }
    best = best_of_warp(best);
    if (best.id % kWarpSize == lane()) taken |= 1u << (best.id / kWarpSize % kWarpSize);
    return best;
  }

  MOERUN_DEVICE void softmax() {
    float largest = -INFINITY;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) largest = fmaxf(largest, at[i]);
    largest = max_over_warp(largest);
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      at[i] = id_of(i) < num_experts ? expf(at[i] - largest) : 0.0f;
      sum += at[i];
    }
    const float inverse = 1.0f / sum_over_warp(sum);
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      const float share = at[i] * inverse;
      at[i] = share == share ? share : 0.0f;  // of infinite logits
    }
  }

  // A round of the sparse mixer (Phi-MoE; arXiv 2409.12136): the largest candidate, and as its
  // score its share of the softmax over the candidates within 2 * jitter of it.
  MOERUN_DEVICE Best mix_round(float jitter) {
    const unsigned taken_before = taken;
    Best best = take_best();
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      const float factor = fmaxf(fabsf(at[i]), best.score);
      const bool is_masked = (best.score - at[i]) / factor > 2 * jitter;
      const bool was_candidate = id_of(i) < num_experts && (taken_before >> i & 1) == 0;
      if (was_candidate && !is_masked && fabsf(at[i]) < INFINITY) sum += expf(at[i] - best.score);
    }
    best.score = 1.0f / sum_over_warp(sum);
    return best;
  }
};

// A block routes kRouteWarps tokens; a warp one of them, its scores spread over the lanes; lane s
// keeps what goes to slot s.
// Preconditions: num_experts <= 32 kPerLane; top_k <= 32, num_experts and slots.
template <RouterKind kKind, unsigned kPerLane>
MOERUN_KERNEL route_kernel(RouteArguments a) {
  const unsigned token = block_x() * num_warps() + warp();
  if (token >= a.tokens) return;
  Scores<kPerLane> scores;
  scores.num_experts = a.num_experts;
  scores.load(a.logits + token * a.pitch);
  if constexpr (kKind == RouterKind::softmax_top_k) scores.softmax();

  unsigned id = 0;
  float weight = 0;
  float sum = 0;
  float largest = 0;
  for (unsigned s = 0; s < a.top_k; ++s) {
    Best best = kKind == RouterKind::sparse_mixer ? scores.mix_round(a.jitter) : scores.take_best();
    if constexpr (kKind == RouterKind::top_k_softmax) {
      if (s == 0) largest = best.score;
      best.score = expf(best.score - largest);
    }
    sum += best.score;
    if (lane() == s) {
      id = best.id;
      weight = best.score;
    }
  }
  const bool is_normed = kKind == RouterKind::top_k_softmax ||
                         (kKind == RouterKind::softmax_top_k && a.norm_topk_prob);
  if (lane() < a.top_k) {
    const std::size_t slot = std::size_t{token} * a.slots + lane();
    a.ids[slot] = static_cast<std::int32_t>(id);
    a.weights[slot] = is_normed ? weight / sum : weight;
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
    weight = 1.0f / (1.0f + expf(-sum_over_warp(sums[0][0])));
  }
  if (lane() == 0) {
    const std::size_t slot = std::size_t{token} * a.slots + a.slots - 1;
    a.ids[slot] = a.shared_id;
    a.weights[slot] = weight;
  }
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

void route(StreamHandle stream, const RouterParams& params, Activations logits, Routing routing) {
  if (logits.rows == 0) return;
  if (logits.cols > kMaxExperts) {
    throw InvalidArgument(message("route: ", logits.cols, " experts; the CUDA router holds ",
                                  kMaxExperts, " at most"));
  }
  const std::size_t most = std::min({kMaxTopK, logits.cols, routing.slots});
  if (params.top_k > most) {
    throw InvalidArgument(message("route: top_k is ", params.top_k, "; with ", logits.cols,
                                  " experts and ", routing.slots, " slots the CUDA router takes ",
                                  most, " at most"));
  }
  const RouteArguments arguments{logits.data,
                                 logits.pitch,
                                 routing.expert_ids,
                                 routing.expert_weights,
                                 static_cast<unsigned>(routing.slots),
                                 static_cast<unsigned>(logits.rows),
                                 static_cast<unsigned>(logits.cols),
                                 static_cast<unsigned>(params.top_k),
                                 params.norm_topk_prob,
                                 params.jitter_noise};
  switch (params.kind) {
    case RouterKind::softmax_top_k:
      return launch_route<RouterKind::softmax_top_k>(stream, arguments);
    case RouterKind::top_k_softmax:
      return launch_route<RouterKind::top_k_softmax>(stream, arguments);
    case RouterKind::sparse_mixer:
      if (params.top_k != 2) {
        throw InvalidArgument(
            message("route: the sparse mixer chooses 2 experts, not ", params.top_k));
      }
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

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
