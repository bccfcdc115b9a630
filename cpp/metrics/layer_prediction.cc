#include "metrics/layer_prediction.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace moerun {
namespace {

void check_pair(const RoutingView& layer, const RoutingView& next, std::size_t table) {
  if (layer.num_experts != next.num_experts || layer.num_tokens() != next.num_tokens() ||
      table != layer.num_experts * layer.num_experts) {
    throw InvalidArgument("layers and table of different sizes cannot be compared");
  }
}

}  // namespace

std::uint64_t hits_of_previous_token(const RoutingView& routing) {
  std::uint64_t hits = 0;
  std::vector<std::size_t> last(routing.num_experts, 0);  // token + 1
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    for (const std::size_t expert : routing.token(t)) {
      if (last[expert] == t && t != 0) ++hits;
      last[expert] = t + 1;
    }
  }
  return hits;
}

void count_pairs(const RoutingView& layer, const RoutingView& next,
                 std::span<std::uint64_t> pairs) {
  check_pair(layer, next, pairs.size());
  for (std::size_t t = 0; t < layer.num_tokens(); ++t) {
    for (const std::size_t a : layer.token(t)) {
      for (const std::size_t b : next.token(t)) ++pairs[a * layer.num_experts + b];
    }
  }
}

std::uint64_t hits_of_previous_layer(const RoutingView& layer, const RoutingView& next,
                                     std::span<const float> weights) {
  check_pair(layer, next, weights.size());
  const std::size_t num_experts = layer.num_experts;
  std::vector<float> scores(num_experts);
  std::vector<std::size_t> order(num_experts);
  std::vector<std::uint8_t> active(num_experts, 0);
  std::uint64_t hits = 0;
  for (std::size_t t = 0; t < layer.num_tokens(); ++t) {
    std::fill(scores.begin(), scores.end(), 0.0f);
    for (const std::size_t a : layer.token(t)) {
      const float* row = weights.data() + a * num_experts;
      for (std::size_t b = 0; b < num_experts; ++b) scores[b] += row[b];
    }
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto named = order.begin() + static_cast<std::ptrdiff_t>(next.slots);
    std::nth_element(order.begin(), named - 1, order.end(), [&](std::size_t a, std::size_t b) {
      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
    });
    for (const std::size_t expert : next.token(t)) active[expert] = 1;
    hits += static_cast<std::uint64_t>(
        std::count_if(order.begin(), named, [&](std::size_t e) { return active[e] != 0; }));
    for (const std::size_t expert : next.token(t)) active[expert] = 0;
  }
  return hits;
}

}  // namespace moerun
