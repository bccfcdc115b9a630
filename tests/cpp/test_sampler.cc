#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "model/sampler.h"

namespace moerun::test {
namespace {

std::map<std::int32_t, int> draw(const SamplingParams& params, const std::vector<float>& logits,
                                 int times) {
  Sampler sampler(params, logits.size());
  std::map<std::int32_t, int> counts;
  for (int i = 0; i < times; ++i) {
    std::vector<float> copy = logits;
    ++counts[sampler.sample(copy)];
  }
  return counts;
}

}  // namespace

TEST("temperature 0 takes the largest logit, of equals the lower id") {
  CHECK_EQ(draw({}, {1, 5, 5, 2}, 1).begin()->first, 1);
}

TEST("frequencies follow the softmax at a temperature") {
  SamplingParams params;
  params.temperature = 0.5;
  const auto counts = draw(params, {0.0f, 0.5f, 1.0f}, 20000);
  const double sum = 1 + std::exp(1.0) + std::exp(2.0);
  CHECK_NEAR(counts.at(0) / 20000.0, 1 / sum, 0.01);
  CHECK_NEAR(counts.at(1) / 20000.0, std::exp(1.0) / sum, 0.015);
  CHECK_NEAR(counts.at(2) / 20000.0, std::exp(2.0) / sum, 0.015);
}

TEST("top_k, top_p and min_p keep what they say") {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.5f), std::log(0.3f),
                                     std::log(0.1f)};
  SamplingParams params;
  params.temperature = 1;
  params.top_k = 2;
  CHECK_EQ(draw(params, logits, 500).size(), std::size_t{2});
  params.top_k = 0;
  params.top_p = 0.79;  // 0.5 does not reach it, 0.5 + 0.3 does
  const auto nucleus = draw(params, logits, 500);
  CHECK(nucleus.size() == 2 && nucleus.contains(1) && nucleus.contains(2));
  params.top_p = 1;
  params.min_p = 0.3;  // of 0.5: keeps 0.15 and above
  CHECK_EQ(draw(params, logits, 500).size(), std::size_t{2});
  params.min_p = 0;
  CHECK_EQ(draw(params, logits, 500).size(), std::size_t{4});
}

TEST("the repetition penalty lowers seen tokens, whatever their sign") {
  SamplingParams params;
  params.repetition_penalty = 2;
  Sampler sampler(params, 3);
  sampler.observe(0);
  std::vector<float> positive = {4, 3, 1};
  CHECK_EQ(sampler.sample(positive), 1);
  std::vector<float> negative = {-2, -3, -5};
  CHECK_EQ(sampler.sample(negative), 1);
}

TEST("equal seeds draw equal tokens") {
  SamplingParams params;
  params.temperature = 1;
  params.seed = 7;
  const std::vector<float> logits(50, 0.0f);
  const auto sequence = [&](std::uint64_t seed) {
    params.seed = seed;
    Sampler sampler(params, logits.size());
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < 20; ++i) {
      auto copy = logits;
      tokens.push_back(sampler.sample(copy));
    }
    return tokens;
  };
  CHECK(sequence(7) == sequence(7));
  CHECK(sequence(7) != sequence(8));
}

TEST("NaN is never sampled, and nothing but NaN is an error") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const double temperature : {0.0, 1.0}) {
    SamplingParams params;
    params.temperature = temperature;
    CHECK_EQ(draw(params, {nan, -1e30f, nan}, 5).begin()->first, 1);
    CHECK_THROWS(FormatError, draw(params, {nan, nan}, 1), "no logit is a number");
  }
}

TEST("sampling parameters out of range are named") {
  const auto with = [](auto change) {
    SamplingParams params;
    change(params);
    return params;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS(InvalidArgument, check_sampling_params(with([&](auto& p) { p.temperature = nan; })),
               "temperature");
  CHECK_THROWS(InvalidArgument, check_sampling_params(with([](auto& p) { p.temperature = -1; })),
               "temperature", "-1");
  CHECK_THROWS(InvalidArgument, check_sampling_params(with([](auto& p) { p.top_k = -2; })),
               "top_k");
  CHECK_THROWS(InvalidArgument, check_sampling_params(with([](auto& p) { p.top_p = 0; })), "top_p");
  CHECK_THROWS(InvalidArgument, check_sampling_params(with([](auto& p) { p.min_p = 2; })), "min_p");
  CHECK_THROWS(InvalidArgument,
               check_sampling_params(with([](auto& p) { p.repetition_penalty = 0; })),
               "repetition_penalty");
}

}  // namespace moerun::test
