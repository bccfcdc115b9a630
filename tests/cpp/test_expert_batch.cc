// The experts of a layer through the backend: the result may not depend on cuts, order or threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "device/backend.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

struct Layer {
  ExpertShape shape;
  std::vector<std::vector<float>> values;       // per expert
  std::vector<std::vector<std::byte>> records;  // the same, encoded
};

Layer make_layer(std::size_t hidden, std::size_t experts, std::size_t inter, std::size_t shared,
                 DType dtype, std::uint64_t seed) {
  RandomWeights random(seed);
  Layer layer;
  layer.shape = {hidden, experts, inter, shared, dtype, dtype};
  for (std::size_t e = 0; e <= experts; ++e) {
    layer.values.push_back(random.matrix(3 * layer.shape.num_records(e), hidden));
    layer.records.push_back(encode(layer.values.back(), dtype));
  }
  return layer;
}

struct Tokens {
  std::size_t count;
  std::size_t slots;
  std::vector<float> x;
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
};

Tokens make_tokens(const Layer& layer, std::size_t count, std::size_t top_k, std::uint64_t seed) {
  RandomWeights random(seed);
  const bool shared = layer.shape.shared_intermediate_size != 0;
  Tokens tokens{
      count, top_k + (shared ? 1u : 0u), random.matrix(count, layer.shape.hidden_size), {}, {}};
  for (float& value : tokens.x) value *= 0.137f;
  for (std::size_t t = 0; t < count; ++t) {
    std::vector<std::int32_t> order(layer.shape.num_experts);
    for (std::size_t e = 0; e < order.size(); ++e) order[e] = static_cast<std::int32_t>(e);
    for (std::size_t s = 0; s < top_k; ++s) {
      std::swap(order[s], order[s + random.below(order.size() - s)]);
      tokens.ids.push_back(order[s]);
      tokens.weights.push_back(0.3f + 0.1f * random.value());
    }
    if (shared) {
      tokens.ids.push_back(static_cast<std::int32_t>(layer.shape.num_experts));
      tokens.weights.push_back(0.77f);
    }
  }
  return tokens;
}

// Cuts every expert into random segments and hands them over in a few calls, experts in random
// order; `seed` 0: whole experts in one call.
std::vector<float> compute(const Layer& layer, Tokens tokens, int threads, std::uint64_t seed) {
  const auto backend = make_cpu_backend(threads, "auto");
  const auto stream = backend->make_stream();
  const std::size_t pitch = padded(layer.shape.hidden_size);
  const Activations x{tokens.x.data(), tokens.count, layer.shape.hidden_size, pitch};
  std::vector<float> y(tokens.count * pitch, 0.25f);
  const Routing routing{tokens.ids.data(), tokens.weights.data(), tokens.count, tokens.slots};
  RandomWeights random(seed);
  std::vector<std::vector<Segment>> queues;
  for (std::size_t e = 0; e < layer.records.size(); ++e) {
    const std::size_t records = layer.shape.num_records(e);
    if (records == 0) continue;
    const std::size_t bytes = layer.records[e].size() / records;
    std::vector<Segment> cut;
    for (std::size_t first = 0; first < records;) {
      std::size_t count = records - first;
      if (seed != 0) {
        count = std::min(count, kQuantumRecords * (1 + random.below(3)));
      }
      cut.push_back(
          {e, first, count, ConstBytes(layer.records[e]).subspan(first * bytes, count * bytes)});
      first += count;
    }
    std::reverse(cut.begin(), cut.end());  // taken from the back
    queues.push_back(cut);
  }
  backend->begin_experts(*stream, layer.shape, x, routing);
  while (!queues.empty()) {
    std::vector<Segment> call;
    const std::size_t size = seed != 0 ? 1 + random.below(5) : 1000;
    while (call.size() < size && !queues.empty()) {
      const std::size_t q = seed != 0 ? random.below(queues.size()) : 0;
      call.push_back(queues[q].back());
      queues[q].pop_back();
      if (queues[q].empty()) queues.erase(queues.begin() + static_cast<std::ptrdiff_t>(q));
    }
    backend->compute_segments(*stream, call);
  }
  backend->finish_experts(*stream, 0.5f, {y.data(), tokens.count, layer.shape.hidden_size, pitch});
  return y;
}

}  // namespace

TEST("experts agree with the formula of one token at a time") {
  for (const DType dtype : kAllDTypes) {
    const Layer layer = make_layer(72, 5, 40, 52, dtype, 5);
    for (const std::size_t count : {1u, 3u, 40u}) {
      const Tokens tokens = make_tokens(layer, count, 2, 6);
      const auto y = compute(layer, tokens, 2, 0);
      const std::size_t pitch = padded(72);
      for (std::size_t t = 0; t < count; ++t) {
        for (std::size_t h = 0; h < 72; ++h) {
          double expected = 0.25;
          for (std::size_t s = 0; s < tokens.slots; ++s) {
            const auto e = static_cast<std::size_t>(tokens.ids[t * tokens.slots + s]);
            const auto& w = layer.values[e];
            double sum = 0;
            for (std::size_t i = 0; i < layer.shape.num_records(e); ++i) {
              double gate = 0;
              double up = 0;
              for (std::size_t c = 0; c < 72; ++c) {
                gate += static_cast<double>(w[3 * i * pitch + c]) * tokens.x[t * pitch + c];
                up += static_cast<double>(w[(3 * i + 1) * pitch + c]) * tokens.x[t * pitch + c];
              }
              sum += gate / (1 + std::exp(-gate)) * up * w[(3 * i + 2) * pitch + h];
            }
            expected += 0.5 * tokens.weights[t * tokens.slots + s] * sum;
          }
          CHECK_NEAR(y[t * pitch + h], expected, 1e-4);
        }
      }
    }
  }
}

TEST("experts have the same bits for every cut into segments, every order and 1 to 4 threads") {
  for (const DType dtype : kAllDTypes) {
    const Layer layer = make_layer(100, 7, 300, 0, dtype, 7);
    const Layer with_shared = make_layer(64, 4, 130, 210, dtype, 8);
    for (const std::size_t count : {1u, 4u, 33u, 150u}) {
      for (const Layer* chosen : {&layer, &with_shared}) {
        const Tokens tokens = make_tokens(*chosen, count, 3, 9 + count);
        const auto whole = compute(*chosen, tokens, 1, 0);
        for (int threads = 1; threads <= 4; ++threads) {
          for (std::uint64_t seed = 0; seed < 4; ++seed) {
            const auto cut = compute(*chosen, tokens, threads, seed);
            CHECK(std::memcmp(whole.data(), cut.data(), whole.size() * sizeof(float)) == 0);
          }
        }
      }
    }
  }
}

TEST("a token's experts have the same bits whatever tokens are in the batch") {
  const Layer layer = make_layer(96, 6, 96, 64, DType::bf16, 10);
  const Tokens many = make_tokens(layer, 140, 2, 11);
  const auto together = compute(layer, many, 2, 0);
  const std::size_t pitch = padded(96);
  for (const std::size_t t : {0u, 1u, 77u, 139u}) {
    Tokens one{1, many.slots, {}, {}, {}};
    one.x.assign(many.x.begin() + static_cast<std::ptrdiff_t>(t * pitch),
                 many.x.begin() + static_cast<std::ptrdiff_t>((t + 1) * pitch));
    for (std::size_t s = 0; s < many.slots; ++s) {
      one.ids.push_back(many.ids[t * many.slots + s]);
      one.weights.push_back(many.weights[t * many.slots + s]);
    }
    const auto alone = compute(layer, one, 1, 0);
    CHECK(std::memcmp(alone.data(), together.data() + t * pitch, 96 * sizeof(float)) == 0);
  }
}

}  // namespace moerun::test
