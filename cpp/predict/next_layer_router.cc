#include "predict/next_layer_router.h"

#include <algorithm>
#include <numeric>

namespace moerun {

NextLayerRouter::NextLayerRouter(const ModelWeights& weights, Backend& backend)
    : weights_(weights), backend_(backend) {
  std::size_t hidden = 0;
  std::size_t experts = 0;
  for (const LayerWeights& layer : weights.layers) {
    hidden = std::max(hidden, layer.experts.hidden_size);
    experts = std::max(experts, layer.experts.num_experts);
  }
  const std::size_t pitch = padded(hidden);
  memory_ = backend.allocate((pitch + padded(experts)) * sizeof(float), "predicting experts",
                             MemoryUse::shared);
  normed_ = {memory_->as<float>(), 1, hidden, pitch};
  logits_ = {memory_->as<float>() + pitch, 1, experts, padded(experts)};
}

std::vector<std::size_t> NextLayerRouter::predict(Stream& stream, std::size_t layer,
                                                  Activations hidden, std::size_t count) {
  const LayerWeights& weights = weights_.layers[layer];
  Activations logits = logits_;
  logits.cols = weights.experts.num_experts;
  backend_.norm(stream, weights.post_attention_norm, hidden, normed_);
  backend_.linear(stream, {weights.router, nullptr}, normed_, logits,
                  {1, false, /*is_routing=*/true});
  stream.synchronize();
  std::vector<std::size_t> experts(logits.cols);
  std::iota(experts.begin(), experts.end(), std::size_t{0});
  const std::size_t wanted = std::min(count, experts.size());
  const float* scores = logits.row(0);
  std::partial_sort(experts.begin(), experts.begin() + static_cast<std::ptrdiff_t>(wanted),
                    experts.end(), [scores](std::size_t a, std::size_t b) {
                      return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
                    });
  experts.resize(wanted);
  return experts;
}

}  // namespace moerun
