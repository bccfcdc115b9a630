// Guesses the experts of a layer before its input is known: that layer's own router, applied to an
// earlier state of the residual stream, which changes little from layer to layer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "device/backend.h"
#include "weights/model_weights.h"

namespace moerun {

// The experts that are named for some tokens together, each once: those of most tokens first, of
// equals those with the better rank. `ids`: (tokens, top_k), the likeliest of each token first.
std::vector<std::size_t> named_by_all(std::span<const std::int32_t> ids, std::size_t top_k,
                                      std::size_t num_experts);

class NextLayerRouter {
 public:
  // Predicts `top_k` experts for each of at most `max_tokens` tokens at a time. Weights and backend
  // must outlive this object.
  NextLayerRouter(const ModelWeights& weights, std::size_t top_k, Backend& backend,
                  std::size_t max_tokens = 1);

  // For Backend::choose_experts(): the router of `layer`, applied to `hidden` (some tokens of the
  // residual stream, before any norm).
  RouteRequest request(std::size_t layer, Activations hidden) const;
  // What the last such request chose, the highest score first; after Backend::wait_for_choice().
  std::vector<std::size_t> predicted(std::size_t token = 0) const;
  // What it chose for the first `tokens` tokens together; see named_by_all().
  std::vector<std::size_t> predicted_by_all(std::size_t tokens) const;
  std::size_t max_tokens() const { return normed_.rows; }

 private:
  const ModelWeights& weights_;
  std::size_t top_k_;
  std::unique_ptr<DeviceBuffer> memory_;
  std::unique_ptr<DeviceBuffer> host_memory_;  // null where the device computes in host memory
  Activations normed_;
  Activations logits_;
  Routing routing_;
  Routing on_host_;
};

}  // namespace moerun
