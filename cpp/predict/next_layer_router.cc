#include "predict/next_layer_router.h"

#include <algorithm>

namespace moerun {

NextLayerRouter::NextLayerRouter(const ModelWeights& weights, std::size_t top_k, Backend& backend,
                                 std::size_t max_tokens)
    : weights_(weights), top_k_(top_k) {
  std::size_t hidden = 0;
  std::size_t experts = 0;
  for (const LayerWeights& layer : weights.layers) {
    hidden = std::max(hidden, layer.experts.hidden_size);
    experts = std::max(experts, layer.experts.num_experts);
  }
  const std::size_t pitch = padded(hidden);
  const std::size_t slots = padded(max_tokens * top_k);
  memory_ = backend.allocate((max_tokens * (pitch + padded(experts)) + 2 * slots) * sizeof(float),
                             "predicting experts", MemoryUse::streamed);
  normed_ = {memory_->as<float>(), max_tokens, hidden, pitch};
  logits_ = {normed_.data + max_tokens * pitch, max_tokens, experts, padded(experts)};
  const auto routing_at = [&](float* weights_at) {
    return Routing{reinterpret_cast<std::int32_t*>(weights_at + slots), weights_at, max_tokens,
                   top_k};
  };
  routing_ = on_host_ = routing_at(logits_.data + max_tokens * padded(experts));
  if (backend.is_host()) return;
  host_memory_ =
      backend.allocate(2 * slots * sizeof(float), "predicted experts", MemoryUse::shared);
  on_host_ = routing_at(host_memory_->as<float>());
}

RouteRequest NextLayerRouter::request(std::size_t layer, Activations hidden) const {
  const LayerWeights& weights = weights_.layers[layer];
  RouteRequest request;
  request.router = weights.router;
  request.norm = &weights.post_attention_norm;
  request.x = hidden;
  request.normed = normed_.slice(0, hidden.rows);
  request.logits = logits_.slice(0, hidden.rows);
  request.logits.cols = weights.experts.num_experts;
  request.routing = routing_;
  request.on_host = on_host_;
  request.routing.tokens = request.on_host.tokens = hidden.rows;
  return request;
}

std::vector<std::size_t> NextLayerRouter::predicted(std::size_t token) const {
  const std::int32_t* ids = on_host_.expert_ids + token * top_k_;
  return {ids, ids + top_k_};
}

std::vector<std::size_t> NextLayerRouter::predicted_by_all(std::size_t tokens) const {
  return named_by_all({on_host_.expert_ids, tokens * top_k_}, top_k_, logits_.cols);
}

std::vector<std::size_t> named_by_all(std::span<const std::int32_t> ids, std::size_t top_k,
                                      std::size_t num_experts) {
  std::vector<std::size_t> experts;  // by rank
  std::vector<std::size_t> num_tokens(num_experts, 0);
  for (std::size_t rank = 0; rank < top_k; ++rank) {
    for (std::size_t row = 0; row < ids.size(); row += top_k) {
      const auto expert = static_cast<std::size_t>(ids[row + rank]);
      if (num_tokens[expert]++ == 0) experts.push_back(expert);
    }
  }
  std::stable_sort(experts.begin(), experts.end(),
                   [&](std::size_t a, std::size_t b) { return num_tokens[a] > num_tokens[b]; });
  return experts;
}

}  // namespace moerun
