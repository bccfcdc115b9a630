// Routing and argmax against the CPU backend.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/argmax.h"
#include "kernels/router.h"
#include "on_device.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Slots of some tokens on the host and on the device.
struct Slots {
  std::size_t tokens;
  std::size_t slots;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  OnDevice<std::int32_t> device_ids;
  OnDevice<float> device_weights;

  Slots(std::size_t num_tokens, std::size_t num_slots)
      : tokens(num_tokens),
        slots(num_slots),
        ids(tokens * slots, -7),
        weights(tokens * slots, -7),
        device_ids(ids),
        device_weights(weights) {}

  Routing host() { return {ids.data(), weights.data(), tokens, slots}; }
  Routing device() { return {device_ids.data(), device_weights.data(), tokens, slots}; }
  void check_same() const {
    CHECK(device_ids.values() == ids);
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const float found = device_weights.values()[i];
      if (std::isnan(weights[i])) {
        CHECK(std::isnan(found));
      } else {
        CHECK_NEAR(found, weights[i], 1e-5 * std::fabs(weights[i]));
      }
    }
  }
};

// Routes the same logits on both; one slot more than is chosen stays as it was.
void check_routing(const RouterParams& params, const std::vector<float>& logits,
                   std::size_t num_experts) {
  const auto cpu = make_cpu_backend(1, "portable");
  const auto cpu_stream = cpu->make_stream();
  TestStream stream;
  const std::size_t tokens = logits.size() / padded(num_experts);
  TestRows rows(logits, tokens, num_experts);
  Slots slots(tokens, params.top_k + 1);
  cpu->route(*cpu_stream, params, rows.host(), slots.host());
  cuda::route(stream, params, rows.device(), slots.device());
  stream.synchronize();
  slots.check_same();
}

// Different from each other, so that rounding cannot change their order.
std::vector<float> distinct_logits(std::size_t tokens, std::size_t num_experts,
                                   RandomWeights& random) {
  std::vector<float> logits(tokens * padded(num_experts));
  for (std::size_t t = 0; t < tokens; ++t) {
    float* row = logits.data() + t * padded(num_experts);
    for (std::size_t e = 0; e < num_experts; ++e) row[e] = 0.01f * static_cast<float>(e);
    for (std::size_t e = num_experts; e > 1; --e) std::swap(row[e - 1], row[random.below(e)]);
  }
  return logits;
}

}  // namespace

TEST("tokens are routed on the device as on the CPU, by every kind of router") {
  RandomWeights random(1);
  for (const std::size_t num_experts : {2u, 8u, 60u, 128u, 160u, 512u}) {
    for (const std::size_t tokens : {1u, 5u}) {
      const auto logits = distinct_logits(tokens, num_experts, random);
      for (const std::size_t top_k : {1u, 2u, 8u, 32u}) {
        if (top_k > num_experts) continue;
        for (const bool norm : {false, true}) {
          check_routing({RouterKind::softmax_top_k, norm, 0, top_k}, logits, num_experts);
        }
        check_routing({RouterKind::top_k_softmax, false, 0, top_k}, logits, num_experts);
      }
      for (const float jitter : {0.01f, 0.2f}) {
        check_routing({RouterKind::sparse_mixer, false, jitter, 2}, logits, num_experts);
      }
    }
  }
}

TEST("of equal scores the lower id is chosen, and of scores that are no numbers none") {
  const std::size_t num_experts = 40;
  std::vector<float> equal(padded(num_experts), 0.5f);
  std::vector<float> pairs(padded(num_experts));
  for (std::size_t e = 0; e < num_experts; ++e) pairs[e] = static_cast<float>(e % 20 / 2);
  std::vector<float> nans = pairs;
  for (const std::size_t e : {18u, 19u, 5u, 39u}) nans[e] = kNaN;
  const std::vector<float> all_nan(padded(num_experts), kNaN);
  std::vector<float> infinite = pairs;
  infinite[7] = -kInfinity;
  for (const auto& logits : {equal, pairs, nans, all_nan, infinite}) {
    for (const std::size_t top_k : {1u, 4u}) {
      check_routing({RouterKind::softmax_top_k, true, 0, top_k}, logits, num_experts);
      check_routing({RouterKind::top_k_softmax, false, 0, top_k}, logits, num_experts);
    }
    check_routing({RouterKind::sparse_mixer, false, 0.01f, 2}, logits, num_experts);
  }
}

TEST("infinite logits give ids that exist, each once, and weights that are no numbers") {
  TestStream stream;
  for (const float value : {kInfinity, -kInfinity}) {
    for (const RouterKind kind :
         {RouterKind::softmax_top_k, RouterKind::top_k_softmax, RouterKind::sparse_mixer}) {
      TestRows rows(std::vector<float>(64, value), 1, 60);
      Slots slots(1, 2);
      cuda::route(stream, {kind, true, 0.01f, 2}, rows.device(), slots.device());
      stream.synchronize();
      CHECK(slots.device_ids.values() == (std::vector<std::int32_t>{0, 1}));
      for (const float weight : slots.device_weights.values()) CHECK(std::isnan(weight));
    }
  }
}

TEST("the shared expert takes the last slot, with the weight that its gate gives") {
  const auto cpu = make_cpu_backend(1, "portable");
  const auto cpu_stream = cpu->make_stream();
  TestStream stream;
  for (const DType dtype : kAllDTypes) {
    for (const std::size_t hidden : {20u, 96u, 1120u}) {
      RandomWeights random(hidden);
      const std::size_t tokens = 5;
      const auto gate = encode(random.matrix(1, hidden), dtype);
      const OnDevice<std::byte> device_gate(gate);
      auto values = random.matrix(tokens, hidden);
      for (float& value : values) value *= 0.1f;
      TestRows x(values, tokens, hidden);
      MatrixView view{gate.data(), dtype, 1, hidden, padded(hidden)};
      Slots slots(tokens, 3);
      cpu->route_shared(*cpu_stream, view, 60, x.host(), slots.host());
      view.data = device_gate.data();
      cuda::route_shared(stream, view, 60, x.device(), slots.device());
      stream.synchronize();
      slots.check_same();
      Slots without(tokens, 1);
      cpu->route_shared(*cpu_stream, {}, 8, x.host(), without.host());
      cuda::route_shared(stream, {}, 8, x.device(), without.device());
      stream.synchronize();
      without.check_same();
    }
  }
}

TEST("argmax finds the first of the largest logits") {
  TestStream stream;
  RandomWeights random(3);
  for (const std::size_t vocab : {1u, 33u, 1000u, 20011u}) {
    const std::size_t rows = 3;
    const auto values = random.matrix(rows, vocab);  // with many equals
    TestRows logits(values, rows, vocab);
    const OnDevice<std::int32_t> ids(rows);
    cuda::argmax(stream, logits.device(), ids.data());
    stream.synchronize();
    for (std::size_t r = 0; r < rows; ++r) {
      const auto row = values.begin() + static_cast<std::ptrdiff_t>(r * padded(vocab));
      const auto expected = std::max_element(row, row + static_cast<std::ptrdiff_t>(vocab)) - row;
      CHECK_EQ(ids.values()[r], static_cast<std::int32_t>(expected));
    }
  }
  for (const float bad : {kNaN, kInfinity, -kInfinity}) {
    std::vector<float> some = {-1, 5, bad, 2, 1, 2};
    some.resize(padded(6));
    TestRows rows(some, 1, 6);
    const OnDevice<std::int32_t> id(std::size_t{1});
    cuda::argmax(stream, rows.device(), id.data());
    stream.synchronize();
    CHECK_EQ(id.values()[0], -1);
  }
}

TEST("the router refuses more experts or slots than it holds") {
  TestStream stream;
  TestRows many(1, 513);
  TestRows few(1, 8);
  Slots slots(1, 40);
  const auto route = [&](TestRows& logits, RouterKind kind, std::size_t top_k) {
    cuda::route(stream, {kind, false, 0, top_k}, logits.device(), slots.device());
  };
  CHECK_THROWS(InvalidArgument, route(many, RouterKind::softmax_top_k, 2), "513", "512");
  CHECK_THROWS(InvalidArgument, route(few, RouterKind::softmax_top_k, 9), "top_k is 9",
               "8 at most");
  CHECK_THROWS(InvalidArgument, route(few, RouterKind::sparse_mixer, 3), "2 experts", "3");
  TestRows enough(1, 64);
  CHECK_THROWS(InvalidArgument, route(enough, RouterKind::softmax_top_k, 33), "top_k is 33",
               "32 at most");
}

}  // namespace moerun::test
