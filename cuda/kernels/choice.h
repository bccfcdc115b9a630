// How the experts of a token are chosen from its router logits; by one warp.
#pragma once

#include <cfloat>
#include <cstddef>

#include "device/op_params.h"
#include "kernels/best.h"
#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr std::size_t kMaxTopK = 32;
inline constexpr std::size_t kMaxExperts = 512;

struct ChoiceRule {
  unsigned top_k;
  bool norm_topk_prob;
  float jitter;
};

inline ChoiceRule rule_of(const RouterParams& params) {
  return {static_cast<unsigned>(params.top_k), params.norm_topk_prob, params.jitter_noise};
}

// The scores of one token, spread over a warp: lane l holds experts l, l + 32, ...
template <unsigned kPerLane>
struct Scores {
  float at[kPerLane];
  unsigned num_experts;
  unsigned taken = 0;  // a bit for each of the lane's experts that has been chosen
  float zero = 0;      // NaN if one of the lane's logits is not finite

  MOERUN_DEVICE static unsigned id_of(unsigned i) { return i * kWarpSize + lane(); }
  MOERUN_DEVICE bool is_candidate(unsigned i) const {
    return id_of(i) < num_experts && (taken >> i & 1) == 0;
  }

  MOERUN_DEVICE void load(const float* logits) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      at[i] = -FLT_MAX;
      if (id_of(i) < num_experts) {
        const float score = load_fresh(logits + id_of(i));
        zero = fused_multiply_add(score, 0.0f, zero);
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

// What goes to the slot of a lane's number.
struct Chosen {
  unsigned id = 0;
  float weight = 0;
};

// Lane s gets what goes to slot s, of rule.top_k. Among logits that are not all finite nothing can
// be chosen: slot s gets expert s, with NaN as its weight.
// Preconditions: num_experts <= 32 kPerLane; top_k <= 32 and num_experts.
template <RouterKind kKind, unsigned kPerLane>
MOERUN_DEVICE Chosen choose(const float* logits, unsigned num_experts, const ChoiceRule& rule) {
  Scores<kPerLane> scores;
  scores.num_experts = num_experts;
  scores.load(logits);
  if constexpr (kKind == RouterKind::softmax_top_k) scores.softmax();
  Chosen own;
  float sum = 0;
  float largest = 0;
  for (unsigned s = 0; s < rule.top_k; ++s) {
    Best best =
        kKind == RouterKind::sparse_mixer ? scores.mix_round(rule.jitter) : scores.take_best();
    if constexpr (kKind == RouterKind::top_k_softmax) {
      if (s == 0) largest = best.score;
      best.score = expf(best.score - largest);
    }
    sum += best.score;
    if (lane() == s) own = {best.id, best.score};
  }
  const bool is_normed = kKind == RouterKind::top_k_softmax ||
                         (kKind == RouterKind::softmax_top_k && rule.norm_topk_prob);
  if (is_normed) own.weight /= sum;
  if (ballot(scores.zero != 0.0f) != 0) own = {lane(), NAN};
  return own;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
