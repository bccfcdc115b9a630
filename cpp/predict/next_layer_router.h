// Guesses the experts of a layer before its input is known: that layer's own router, applied to an
// earlier state of the residual stream, which changes little from layer to layer.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "device/backend.h"
#include "weights/model_weights.h"

namespace moerun {

class NextLayerRouter {
 public:
  // Both must outlive this object.
  NextLayerRouter(const ModelWeights& weights, Backend& backend);

  // The `count` experts that the router of `layer` scores highest for `hidden` (one token of the
  // residual stream, before any norm), likeliest first; of equals the lower index. Not for several
  // threads at once.
  std::vector<std::size_t> predict(Stream& stream, std::size_t layer, Activations hidden,
                                   std::size_t count);

 private:
  const ModelWeights& weights_;
  Backend& backend_;
  std::unique_ptr<DeviceBuffer> memory_;
  Activations normed_;
  Activations logits_;
};

}  // namespace moerun
