// Where each family keeps its tensors, under the names of Hugging Face checkpoints.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "weights/model_config.h"

namespace moerun {

// Finds tensors by what they are. Several names may mean one thing (checkpoints saved by different
// versions of transformers); the first that is present counts, and the first in the list is the one
// a message asks for.
class TensorNames {
 public:
  TensorNames(const ModelConfig& config, const Checkpoint& checkpoint)
      : config_(config), checkpoint_(checkpoint) {}

  std::string embedding() const { return "model.embed_tokens.weight"; }
  std::string final_norm() const { return "model.norm"; }
  std::string lm_head() const { return "lm_head"; }

  // Prefixes: ".weight" and ".bias" follow.
  std::string layer(std::int64_t layer, const std::string& part) const;
  std::string router(std::int64_t layer) const;  // the whole name

  // Routed experts are one tensor each, or all experts of a layer fused into two tensors.
  struct Experts {
    bool fused = false;
    std::string gate_up;  // fused: (num_experts, 2 * intermediate, hidden), gate rows first
    std::string down;     // fused: (num_experts, hidden, intermediate)
  };
  Experts experts(std::int64_t layer) const;
  // The tensor of one expert: `projection` is "gate", "up" or "down".
  std::string expert(std::int64_t layer, std::int64_t expert, const std::string& projection) const;

 private:
  std::string present(const std::vector<std::string>& candidates) const;

  const ModelConfig& config_;
  const Checkpoint& checkpoint_;
};

}  // namespace moerun
