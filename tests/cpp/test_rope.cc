// Expected numbers: transformers 5.23, modeling_rope_utils.py, printed with nine digits.
#include "weights/rope.h"

#include <utility>
#include <vector>

#include "check.h"

namespace moerun {
namespace {

ModelConfig with_rope(RopeKind kind, double theta, std::int64_t head_dim) {
  ModelConfig config;
  config.head_dim = head_dim;
  config.max_position_embeddings = 32768;
  config.rope.kind = kind;
  config.rope.theta = theta;
  return config;
}

// Within one unit in the last place of a float.
void check_values(const std::vector<float>& found,
                  const std::vector<std::pair<std::size_t, double>>& expected) {
  for (const auto& [i, value] : expected) CHECK_NEAR(found.at(i) / value, 1.0, 1.3e-7);
}

TEST("rope: standard") {
  const auto table = make_rope_table(with_rope(RopeKind::standard, 1e6, 128));
  CHECK_EQ(table.inv_freq.size(), 64u);
  CHECK(table.inv_freq_long.empty());
  CHECK_EQ(table.scale, 1.0f);
  check_values(table.inv_freq, {{0, 1.0},
                                {1, 0.805842221},
                                {16, 0.0316227786},
                                {32, 0.00100000005},
                                {48, 3.16227743e-05},
                                {63, 1.24093776e-06}});
  const auto odd = make_rope_table(with_rope(RopeKind::standard, 5e5, 22));
  check_values(odd.inv_freq, {{1, 0.303327531}, {5, 0.00256778696}, {10, 6.59353054e-06}});
}

TEST("rope: linear") {
  auto config = with_rope(RopeKind::linear, 1e4, 128);
  config.rope.factor = 4.0;
  const auto table = make_rope_table(config);
  check_values(table.inv_freq,
               {{0, 0.25}, {1, 0.216491088}, {32, 0.00249999994}, {63, 2.88695483e-05}});
}

TEST("rope: llama3") {
  auto config = with_rope(RopeKind::llama3, 5e5, 128);
  config.rope.factor = 8.0;
  config.rope.original_max_position_embeddings = 8192;
  const auto table = make_rope_table(config);
  check_values(table.inv_freq, {{1, 0.814617217},
                                {16, 0.0376060307},
                                {32, 0.000524846022},
                                {48, 6.64786967e-06},
                                {63, 3.06892588e-07}});
}

TEST("rope: yarn") {
  auto config = with_rope(RopeKind::yarn, 1e6, 128);
  config.rope.factor = 4.0;
  config.rope.original_max_position_embeddings = 8192;
  const auto table = make_rope_table(config);
  check_values(table.inv_freq, {{1, 0.805842221},
                                {16, 0.0316227786},
                                {32, 0.000338235288},
                                {48, 7.90569356e-06},
                                {63, 3.10234441e-07}});
  CHECK_NEAR(table.scale, 1.138629436111989, 1e-7);
}

TEST("rope: yarn with mscale and a range that is not truncated") {
  auto config = with_rope(RopeKind::yarn, 1e4, 64);
  config.rope.factor = 40.0;
  config.rope.original_max_position_embeddings = 4096;
  config.rope.mscale = 0.707;
  config.rope.mscale_all_dim = 1.0;
  config.rope.truncate = false;
  auto table = make_rope_table(config);
  check_values(table.inv_freq,
               {{8, 0.100000001}, {16, 0.00552406255}, {24, 2.49999994e-05}, {31, 3.33380353e-06}});
  CHECK_NEAR(table.scale, 0.9210423553163399, 1e-7);
  config.rope.attention_factor = 1.25;
  CHECK_EQ(make_rope_table(config).scale, 1.25f);
}

ModelConfig with_longrope() {
  auto config = with_rope(RopeKind::longrope, 1e4, 64);
  for (int i = 0; i < 32; ++i) {
    config.rope.short_factor.push_back(1.0 + 0.01 * i);
    config.rope.long_factor.push_back(1.5 + 0.7 * i);
  }
  config.rope.original_max_position_embeddings = 4096;
  config.rope.factor = 8.0;
  return config;
}

TEST("rope: longrope") {
  const auto table = make_rope_table(with_longrope());
  check_values(
      table.inv_freq,
      {{0, 1.0}, {1, 0.74246949}, {8, 0.0925925896}, {16, 0.00862068962}, {31, 0.000101795536}});
  check_values(table.inv_freq_long, {{0, 0.666666687},
                                     {1, 0.340860993},
                                     {8, 0.0140845068},
                                     {16, 0.000787401572},
                                     {31, 5.74793739e-06}});
  CHECK_EQ(table.long_above, 4096);
  CHECK_NEAR(table.scale, 1.118033988749895, 1e-7);
  CHECK_EQ(table.scale, table.scale_long);
}

TEST("rope: longrope of Phi-MoE scales the short and the long set differently") {
  auto config = with_longrope();
  config.rope.short_mscale = 1.2;
  config.rope.long_mscale = 1.3;
  const auto table = make_rope_table(config);
  CHECK_EQ(table.scale, 1.2f);
  CHECK_EQ(table.scale_long, 1.3f);
}

}  // namespace
}  // namespace moerun
