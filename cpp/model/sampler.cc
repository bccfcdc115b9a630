#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace moerun {
namespace {

void require(bool holds, const char* field, double found, const char* expected) {
  if (!holds) throw InvalidArgument(message(field, ": expected ", expected, ", found ", found));
}

}  // namespace

void check_sampling_params(const SamplingParams& params) {
  require(std::isfinite(params.temperature) && params.temperature >= 0, "temperature",
          params.temperature, "a number of at least 0");
  require(params.top_k >= 0, "top_k", static_cast<double>(params.top_k), "0 (all) or more");
  require(params.top_p > 0 && params.top_p <= 1, "top_p", params.top_p, "more than 0, at most 1");
  require(params.min_p >= 0 && params.min_p <= 1, "min_p", params.min_p, "0 to 1");
  require(std::isfinite(params.repetition_penalty) && params.repetition_penalty > 0,
          "repetition_penalty", params.repetition_penalty, "a number above 0");
}

Sampler::Sampler(const SamplingParams& params, std::size_t vocab_size)
    : params_(params), random_(params.seed), seen_(vocab_size, 0) {
  check_sampling_params(params);
}

void Sampler::observe(std::int32_t token_id) { seen_[static_cast<std::size_t>(token_id)] = 1; }

std::int32_t Sampler::sample(std::span<float> logits) {
  if (params_.repetition_penalty != 1.0) {
    const auto penalty = static_cast<float>(params_.repetition_penalty);
    for (std::size_t id = 0; id < logits.size(); ++id) {
      if (seen_[id]) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    }
  }
  // Of equal logits the lower id wins; NaN never does.
  std::size_t best = logits.size();
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (!std::isnan(logits[id]) && (best == logits.size() || logits[id] > logits[best])) best = id;
  }
  if (best == logits.size()) {
    throw FormatError("no logit is a number: the weights of the model's head are damaged");
  }
  if (params_.temperature == 0.0) return static_cast<std::int32_t>(best);

  candidates_.clear();
  for (std::size_t id = 0; id < logits.size(); ++id) {
    if (!std::isnan(logits[id])) candidates_.push_back({logits[id], static_cast<std::int32_t>(id)});
  }
  const auto more_probable = [](const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
  };
  const auto k = static_cast<std::size_t>(params_.top_k);
  if (k != 0 && k < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(k) - 1,
                     candidates_.end(), more_probable);
    candidates_.resize(k);
  }
  double sum = 0;
  for (const Candidate& candidate : candidates_) sum += weight(candidate, logits[best]);

  // The likeliest first. A heap, for only a few of a large vocabulary are ever asked for.
  const auto less_probable = [&](const Candidate& a, const Candidate& b) {
    return more_probable(b, a);
  };
  std::make_heap(candidates_.begin(), candidates_.end(), less_probable);
  std::size_t num_ordered = 0;
  const auto next = [&] {
    const auto end = candidates_.end() - static_cast<std::ptrdiff_t>(num_ordered++);
    std::pop_heap(candidates_.begin(), end, less_probable);
    return *(end - 1);
  };

  double kept = sum;
  std::size_t count = candidates_.size();
  if (params_.top_p < 1.0 || params_.min_p > 0) {
    const double enough = params_.top_p * sum;
    kept = 0;
    count = 0;
    while (num_ordered < candidates_.size() &&
           (count == 0 || kept < enough || params_.top_p == 1.0)) {
      const double probability = weight(next(), logits[best]);
      if (probability < params_.min_p) break;  // of the first one it is 1
      kept += probability;
      ++count;
    }
  }
  // 53 random bits: a uniform number in [0, 1) that is the same on every platform.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * kept;
  for (std::size_t place = 0;; ++place) {
    const Candidate candidate =
        place < num_ordered ? candidates_[candidates_.size() - 1 - place] : next();
    const double probability = weight(candidate, logits[best]);
    if (place + 1 >= count || !(left >= probability)) return candidate.token_id;
    left -= probability;
  }
}

double Sampler::weight(const Candidate& candidate, float best) const {
  const double shifted = static_cast<double>(candidate.logit) - best;
  return std::exp(shifted / params_.temperature);
}

}  // namespace moerun
