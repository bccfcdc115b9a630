// The experts of few tokens: float32 sums in one order, whatever comes with what.
#include <cstring>

#include "base/error.h"
#include "check.h"
#include "kernels/expert_sum.h"
#include "kernels/segment_gemv.h"
#include "on_device.h"
#include "segment_layer.h"

namespace moerun::test {
namespace {

bool are_same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST("experts of few tokens agree with those on the CPU") {
  for (const DType dtype : kAllDTypes) {
    const ExpertLayer layers[] = {
        make_expert_layer({96, 5, 52, 0, dtype, dtype}, 1),
        make_expert_layer({72, 3, 40, 0, dtype, dtype}, 2),
        make_expert_layer({192, 4, 33, 100, dtype, DType::f32}, 3),
        make_expert_layer({288, 3, 64, 7, DType::bf16, dtype}, 4),
    };
    for (const ExpertLayer& layer : layers) {
      for (const std::size_t count : {1u, 2u, 3u, 5u, 8u}) {
        const auto tokens = make_expert_tokens(layer, count, 2, 10 + count);
        const auto expected = experts_on_cpu(layer, tokens);
        const auto found = experts_on_device(layer, tokens, {});
        CHECK_NEAR(relative_error(found, expected, layer.shape.hidden_size), 0, 1e-5);
      }
    }
  }
}

TEST("experts too wide for all tokens at once take them in turn") {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    const auto layer = make_expert_layer({8225, 1, 3, 0, dtype, dtype}, 3);
    const auto tokens = make_expert_tokens(layer, 5, 1, 4);
    const auto found = experts_on_device(layer, tokens, {});
    CHECK_NEAR(relative_error(found, experts_on_cpu(layer, tokens), 8225), 0, 1e-5);
  }
}

TEST("experts of few tokens have the same bits for every cut, order and launch") {
  for (const DType dtype : kAllDTypes) {
    const auto layer = make_expert_layer({96, 4, 170, 100, dtype, DType::bf16}, 5);
    const auto tokens = make_expert_tokens(layer, 3, 1, 6);
    set_order(Order::late_copies, 1);
    const auto whole = experts_on_device(layer, tokens, {});
    for (std::uint64_t seed = 1; seed < 6; ++seed) {
      set_order(seed % 2 == 0 ? Order::random : Order::late_copies, seed);
      DeviceRun run;
      run.cuts = seed;
      CHECK(are_same_bits(experts_on_device(layer, tokens, run), whole));
    }
  }
}

TEST("a token's experts have the same bits alone and beside others") {
  const auto layer = make_expert_layer({160, 3, 70, 33, DType::bf16, DType::f16}, 7);
  const auto tokens = make_expert_tokens(layer, 19, 2, 8);
  const auto together = experts_on_device(layer, tokens, {});
  for (const std::size_t count : {1u, 2u, 4u, 7u}) {
    const std::size_t first = 19 - 2 * count;
    const auto some = experts_on_device(layer, slice_of(tokens, first, count), {});
    CHECK(std::memcmp(some.data(), together.data() + first * 160, some.size() * 4) == 0);
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("an expert kernel without one of its barriers gives a wrong answer") {
  const auto layer = make_expert_layer({96, 4, 64, 0, DType::bf16, DType::bf16}, 9);
  const auto tokens = make_expert_tokens(layer, 1, 2, 10);
  const auto expected = experts_on_cpu(layer, tokens);
  // After x is there, and between the phases.
  for (const int barrier : {1, 2}) {
    std::size_t num_wrong = 0;
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      set_order(Order::random, seed);
      cuda_host::set_broken_barrier(barrier);
      const auto found = experts_on_device(layer, tokens, {});
      cuda_host::set_broken_barrier(-1);
      num_wrong += !(relative_error(found, expected, 96) < 1e-3);
    }
    CHECK_EQ(num_wrong, std::size_t{8});
  }
}
#endif

TEST("experts that are too wide or folded are refused by the kernel of few tokens") {
  cuda::ExpertWork work;
  work.shape.hidden_size = 1 << 20;
  work.routing = {nullptr, nullptr, 1, 1};
  CHECK_THROWS(DeviceError, (cuda::compute_segments_few({}, work, nullptr, 1, 32), 0),
               "compute_few needs", "bytes of shared memory");
  work.is_folded = true;
  CHECK_THROWS(InvalidArgument, (cuda::compute_segments_few({}, work, nullptr, 1, 32), 0),
               "folded");
}

}  // namespace moerun::test
