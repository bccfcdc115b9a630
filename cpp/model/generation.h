// Text generation, a token a call.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "model/sampler.h"
#include "model/session.h"

namespace moerun {

struct GenerationParams {
  SamplingParams sampling;
  std::size_t max_new_tokens = 0;
  std::vector<std::int32_t> stop_token_ids;
};

class Generation {
 public:
  // Checks everything, computes nothing yet.
  Generation(std::shared_ptr<Model> model, std::vector<std::int32_t> prompt,
             const GenerationParams& params);

  // The next token; none after a stop token, after max_new_tokens, or when the context is full.
  // The first call runs the prompt. A call that throws (an interruption, say) ends the generation;
  // after a DeviceError every later one throws, too.
  std::optional<std::int32_t> next(const Checkpointer& between_layers = {});

  const GenerationStats& stats() const { return stats_; }
  bool is_lost() const noexcept { return session_.model().is_lost(); }  // see Model

 private:
  using Clock = std::chrono::steady_clock;

  std::vector<std::int32_t> prompt_;
  GenerationParams params_;
  Session session_;
  Sampler sampler_;
  std::vector<float> logits_;
  std::int32_t last_token_ = -1;
  bool finished_ = false;
  Clock::time_point started_ = Clock::now();
  GenerationStats stats_;
};

// The pointer that owners of one hold.
using OwnedGeneration = std::unique_ptr<Generation, DeleteUnlessLost>;

}  // namespace moerun
