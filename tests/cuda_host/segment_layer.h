// A layer's experts on the device and on the CPU, for tests of the expert kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "device/op_params.h"
#include "random_weights.h"

namespace moerun::test {

struct ExpertLayer {
  ExpertShape shape;
  std::vector<std::vector<std::byte>> records;  // of each expert, the shared one last
};
ExpertLayer make_expert_layer(const ExpertShape& shape, std::uint64_t seed);

struct ExpertTokens {
  std::size_t count = 0;
  std::size_t slots = 0;
  std::vector<float> x;  // (count, padded(hidden_size))
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};
ExpertTokens make_expert_tokens(const ExpertLayer& layer, std::size_t count, std::size_t top_k,
                                std::uint64_t seed);
// Tokens [first, first + count) by themselves.
ExpertTokens slice_of(const ExpertTokens& tokens, std::size_t first, std::size_t count);

struct DeviceRun {
  bool many = false;  // the kernels of many tokens
  bool is_folded = false;
  // Cuts experts at random and hands segments over in random order, in random launches; folded,
  // those of one expert in rising order. 0: whole experts in one launch.
  std::uint64_t cuts = 0;
};

// (count, hidden_size): 0.25 + 0.5 * what the experts give.
std::vector<float> experts_on_cpu(const ExpertLayer& layer, ExpertTokens tokens);
std::vector<float> experts_on_device(const ExpertLayer& layer, const ExpertTokens& tokens,
                                     const DeviceRun& run);

// The largest difference of a token's numbers over the largest of them; of all tokens.
double relative_error(const std::vector<float>& found, const std::vector<float>& expected,
                      std::size_t cols);

}  // namespace moerun::test
