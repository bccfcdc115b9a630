// The experts of many tokens: tensor cores, and sums by quantum or folded.
#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "check.h"
#include "kernels/segment_gemm.h"
#include "on_device.h"
#include "segment_layer.h"

namespace moerun::test {
namespace {

bool are_same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// As far as activations are rounded.
double tolerance_of(DType dtype) {
  return dtype == DType::bf16 ? 1e-2 : dtype == DType::f16 ? 1e-3 : 1e-5;
}

DeviceRun many(bool is_folded, std::uint64_t cuts = 0) { return {true, is_folded, cuts}; }

}  // namespace

TEST("experts of many tokens agree with those on the CPU") {
  const ExpertLayer layers[] = {
      make_expert_layer({96, 5, 52, 0, DType::bf16, DType::bf16}, 1),
      make_expert_layer({72, 3, 40, 100, DType::bf16, DType::bf16}, 2),
      make_expert_layer({320, 4, 33, 70, DType::bf16, DType::f32}, 3),
      make_expert_layer({72, 3, 40, 100, DType::f16, DType::f16}, 4),
      make_expert_layer({104, 3, 52, 0, DType::f16, DType::f16}, 5),
  };
  for (const ExpertLayer& layer : layers) {
    for (const std::size_t count : {9u, 17u, 40u}) {
      const auto tokens = make_expert_tokens(layer, count, 2, 10 + count);
      const auto expected = experts_on_cpu(layer, tokens);
      for (const bool is_folded : {false, true}) {
        const auto found = experts_on_device(layer, tokens, many(is_folded));
        CHECK_NEAR(relative_error(found, expected, layer.shape.hidden_size), 0,
                   tolerance_of(layer.shape.dtype));
      }
    }
  }
}

TEST("experts of many tokens in F32 agree with the CPU to float32") {
  const auto layer = make_expert_layer({104, 3, 40, 70, DType::f32, DType::f32}, 4);
  for (const std::size_t count : {9u, 21u}) {
    const auto tokens = make_expert_tokens(layer, count, 2, 10 + count);
    const auto expected = experts_on_cpu(layer, tokens);
    for (const bool is_folded : {false, true}) {
      const auto found = experts_on_device(layer, tokens, many(is_folded));
      CHECK_NEAR(relative_error(found, expected, 104), 0, 1e-5);
    }
    CHECK(are_same_bits(experts_on_device(layer, tokens, many(false)),
                        experts_on_device(layer, tokens, {})));
  }
}

TEST("routed and shared experts of many tokens may have any two dtypes") {
  for (const DType routed : kAllDTypes) {
    for (const DType shared : kAllDTypes) {
      const auto layer = make_expert_layer({72, 2, 40, 36, routed, shared}, 6);
      const auto tokens = make_expert_tokens(layer, 10, 1, 7);
      const auto found = experts_on_device(layer, tokens, many(true));
      CHECK_NEAR(relative_error(found, experts_on_cpu(layer, tokens), 72), 0,
                 std::max(tolerance_of(routed), tolerance_of(shared)));
    }
  }
}

TEST("F16 experts take activations that F16 does not hold") {
  const auto layer = make_expert_layer({72, 2, 40, 36, DType::f16, DType::f16}, 8);
  auto tokens = make_expert_tokens(layer, 10, 2, 9);
  for (float& value : tokens.x) value *= 1e6f;
  const auto expected = experts_on_cpu(layer, tokens);
  CHECK(*std::max_element(expected.begin(), expected.end()) > 1e10f);
  for (const bool is_folded : {false, true}) {
    const auto found = experts_on_device(layer, tokens, many(is_folded));
    CHECK_NEAR(relative_error(found, expected, 72), 0, 1e-3);
  }
}

TEST("blocks take the tokens of an expert in turn where there are very many") {
  for (const DType dtype : kAllDTypes) {
    const auto layer = make_expert_layer({40, 1, 35, 0, dtype, dtype}, 5);
    const auto tokens = make_expert_tokens(layer, 265, 1, 6);
    const auto expected = experts_on_cpu(layer, tokens);
    for (const bool is_folded : {false, true}) {
      const auto found = experts_on_device(layer, tokens, many(is_folded));
      CHECK_NEAR(relative_error(found, expected, 40), 0, tolerance_of(dtype));
    }
  }
}

TEST("very wide experts of many tokens agree with the CPU") {
  for (const DType dtype : {DType::f16, DType::f32}) {
    const auto layer = make_expert_layer({8225, 1, 3, 2, dtype, DType::bf16}, 3);
    const auto tokens = make_expert_tokens(layer, 3, 1, 4);
    const auto found = experts_on_device(layer, tokens, many(true));
    CHECK_NEAR(relative_error(found, experts_on_cpu(layer, tokens), 8225), 0, 1e-2);
  }
}

TEST("experts of many tokens have the same bits for every cut, order and launch") {
  const ExpertLayer layers[] = {
      make_expert_layer({96, 4, 170, 100, DType::bf16, DType::bf16}, 5),
      make_expert_layer({64, 3, 100, 130, DType::f16, DType::bf16}, 6),
      make_expert_layer({64, 2, 70, 40, DType::f32, DType::f16}, 7),
  };
  for (const ExpertLayer& layer : layers) {
    const auto tokens = make_expert_tokens(layer, 35, 1, 7);
    for (const bool is_folded : {false, true}) {
      set_order(Order::late_copies, 1);
      const auto whole = experts_on_device(layer, tokens, many(is_folded));
      for (std::uint64_t seed = 1; seed < 4; ++seed) {
        set_order(seed % 2 == 0 ? Order::random : Order::late_copies, seed);
        CHECK(are_same_bits(experts_on_device(layer, tokens, many(is_folded, seed)), whole));
      }
    }
  }
}

TEST("a token's experts have the same bits in a batch of 70 and of 9") {
  const auto layer = make_expert_layer({64, 3, 40, 33, DType::bf16, DType::f16}, 8);
  const auto tokens = make_expert_tokens(layer, 70, 2, 9);
  for (const bool is_folded : {false, true}) {
    const auto together = experts_on_device(layer, tokens, many(is_folded));
    for (const std::size_t first : {0u, 31u, 61u}) {
      const auto some = experts_on_device(layer, slice_of(tokens, first, 9), many(is_folded));
      CHECK(std::memcmp(some.data(), together.data() + first * 64, some.size() * 4) == 0);
    }
  }
}

TEST("experts of many tokens say how much scratch memory they lack") {
  cuda::ExpertWork work;
  work.shape = {96, 4, 64, 0, DType::bf16, DType::bf16};
  work.routing = {nullptr, nullptr, 40, 2};
  const std::size_t bytes = cuda::grouping_bytes(work.shape, 40, 2);
  CHECK_THROWS(InvalidArgument,
               (cuda::compute_segments_many({}, work, nullptr, 1, 64, nullptr, bytes - 1), 0),
               std::to_string(bytes), std::to_string(bytes - 1));
}

}  // namespace moerun::test
