// From logits to a token.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace moerun {

// Applied in this order: repetition penalty, temperature, top_k, top_p, min_p.
struct SamplingParams {
  double temperature = 0.0;         // 0: the most probable token, always
  std::int64_t top_k = 0;           // keep the k most probable; 0: all
  double top_p = 1.0;               // keep the fewest whose probabilities reach this
  double min_p = 0.0;               // keep those of at least this share of the best one
  double repetition_penalty = 1.0;  // divides positive, multiplies negative logits of tokens seen
  std::uint64_t seed = 0;
};

// Throws InvalidArgument naming the field that is out of range.
void check_sampling_params(const SamplingParams& params);

class Sampler {
 public:
  Sampler(const SamplingParams& params, std::size_t vocab_size);

  // Marks a token as seen, for the repetition penalty.
  void observe(std::int32_t token_id);
  // `logits` (vocab_size) is changed by the repetition penalty. Throws FormatError if no logit is a
  // number: the weights are broken.
  std::int32_t sample(std::span<float> logits);

 private:
  struct Candidate {
    float logit;
    std::int32_t token_id;
  };
  // Not normalised; 1 for a logit of `best`.
  double weight(const Candidate& candidate, float best) const;

  SamplingParams params_;
  std::mt19937_64 random_;
  std::vector<std::uint8_t> seen_;
  std::vector<Candidate> candidates_;
};

}  // namespace moerun
