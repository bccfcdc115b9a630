// Routing on the CPU: from router logits to expert ids and weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/finite.h"
#include "device/cpu/cpu_backend.h"

namespace moerun {
namespace {

// Writes the ids of the k largest scores by falling score, of equals the lower id first. k is
// small: insertion into a sorted list beats a heap.
void choose_top_k(const float* scores, std::size_t num_experts, std::size_t k, std::int32_t* ids) {
  std::size_t count = 0;
  for (std::size_t e = 0; e < num_experts; ++e) {
    if (count == k && !(scores[e] > scores[ids[count - 1]])) continue;
    std::size_t place = count < k ? count++ : k - 1;
    for (; place > 0 && scores[e] > scores[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = static_cast<std::int32_t>(e);
  }
}

// One round of the sparse mixer (Phi-MoE modelling code; arXiv 2409.12136): the largest of the
// candidates, and its share of the softmax over those candidates within 2 * jitter of it.
// `scores` are the original logits, `candidates` the same with earlier choices at -inf.
std::int32_t mix_round(const float* scores, const float* candidates, std::size_t num_experts,
                       float jitter, float* weight) {
  const auto chosen =
      static_cast<std::size_t>(std::max_element(candidates, candidates + num_experts) - candidates);
  const float largest = candidates[chosen];
  float sum = 0;
  for (std::size_t e = 0; e < num_experts; ++e) {
    const float factor = std::max(std::fabs(scores[e]), largest);
    const bool masked = (largest - scores[e]) / factor > 2 * jitter;
    if (!masked && std::isfinite(candidates[e])) sum += std::exp(candidates[e] - largest);
  }
  *weight = 1.0f / sum;
  return static_cast<std::int32_t>(chosen);
}

void sparse_mixer(float* logits, std::size_t num_experts, float jitter, std::int32_t* ids,
                  float* weights, float* candidates) {
  std::copy(logits, logits + num_experts, candidates);
  ids[0] = mix_round(logits, candidates, num_experts, jitter, &weights[0]);
  candidates[ids[0]] = -std::numeric_limits<float>::infinity();
  ids[1] = mix_round(logits, candidates, num_experts, jitter, &weights[1]);
}

}  // namespace

void CpuBackend::route(Stream& stream, const RouterParams& params, Activations logits,
                       Routing routing) {
  const std::size_t num_experts = logits.cols;
  const std::size_t k = params.top_k;
  // Exponential functions and comparisons, each of which takes about as long as 16 products.
  const LoopWork work{.multiply_adds = 16 * logits.rows * num_experts};
  pool_.parallel_for(logits.rows, work, [&](std::size_t t, int worker) {
    // The logits stay as they are, for who records them.
    float* scores = static_cast<CpuStream&>(stream).worker_floats(worker, 2 * num_experts);
    std::int32_t* ids = routing.expert_ids + t * routing.slots;
    float* weights = routing.expert_weights + t * routing.slots;
    std::copy_n(logits.row(t), num_experts, scores);
    // Without finite logits no choice is right. Weights of NaN make the layer's output NaN.
    if (!all_finite({scores, num_experts})) {
      std::iota(ids, ids + k, 0);
      std::fill_n(weights, k, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    switch (params.kind) {
      case RouterKind::softmax_top_k: {
        kernels_.softmax(scores, num_experts, 1.0f);
        choose_top_k(scores, num_experts, k, ids);
        float sum = 0;
        for (std::size_t s = 0; s < k; ++s) sum += weights[s] = scores[ids[s]];
        if (params.norm_topk_prob) {
          for (std::size_t s = 0; s < k; ++s) weights[s] /= sum;
        }
        break;
      }
      case RouterKind::top_k_softmax: {
        choose_top_k(scores, num_experts, k, ids);
        float sum = 0;
        for (std::size_t s = 0; s < k; ++s) {
          sum += weights[s] = std::exp(scores[ids[s]] - scores[ids[0]]);
        }
        for (std::size_t s = 0; s < k; ++s) weights[s] /= sum;
        break;
      }
      case RouterKind::sparse_mixer:
        sparse_mixer(scores, num_experts, params.jitter_noise, ids, weights, scores + num_experts);
        break;
    }
  });
}

void CpuBackend::route_shared(Stream& stream, const MatrixView& gate, std::int32_t shared_id,
                              Activations x, Routing routing) {
  const LoopWork work{gate.bytes(), x.rows * gate.pitch};
  pool_.parallel_for(x.rows, work, [&](std::size_t t, int worker) {
    const std::size_t last = t * routing.slots + routing.slots - 1;
    float weight = 1;
    if (!gate.empty()) {
      const float* in = x.row(t);
      float product = 0;
      float* out = &product;
      kernels_.dot(gate.dtype, gate.data, gate.row_bytes(), 1, gate.pitch, &in, &out, 1,
                   static_cast<CpuStream&>(stream).kernel_scratch(worker));
      weight = 1.0f / (1.0f + std::exp(-nan_unless_finite(product)));
    }
    routing.expert_ids[last] = shared_id;
    routing.expert_weights[last] = weight;
  });
}

}  // namespace moerun
