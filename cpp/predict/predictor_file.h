// The file of a routing-path predictor: a safetensors file that names its sizes and the model that
// it is of. Everything it says is checked before it is used. docs/predictor.md has the format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/view.h"
#include "device/backend.h"

namespace moerun {

// Sizes of the net, and of the routing that it predicts.
struct PredictorShape {
  std::size_t vocab_size = 0;
  std::vector<std::size_t> moe_layers;  // layer numbers, rising
  std::size_t num_experts = 0;          // of a layer
  std::size_t top_k = 0;

  std::size_t embedding_size = 0;
  std::size_t hidden_size = 0;
  std::size_t mlp_size = 0;
  std::size_t num_blocks = 0;
  std::size_t num_heads = 0;
  std::size_t window = 0;  // tokens that attention sees, the current one included

  std::size_t num_outputs() const { return moe_layers.size() * num_experts; }
  std::size_t head_dim() const { return hidden_size / num_heads; }
};

// What a predictor must have been trained for; what is empty or 0 is not compared.
struct ExpectedModel {
  std::string model_id;        // ModelIdentity.model_id of moerun.identity
  std::string tokenizer_hash;  // ModelIdentity.tokenizer_hash: 64 hexadecimal digits
  std::size_t vocab_size = 0;
  std::vector<std::size_t> moe_layers;
  std::size_t num_experts = 0;
  std::size_t top_k = 0;
};

struct PredictorBlock {
  NormWeights attention_norm;
  MatrixView qkv;  // (3 hidden, hidden)
  MatrixView attention_output;
  NormWeights mlp_norm;
  MatrixView mlp_up;    // (mlp, hidden)
  MatrixView mlp_down;  // (hidden, mlp)
};

// In memory that `memory` owns; rows need no padding, for all sizes are multiples of it.
struct PredictorWeights {
  std::unique_ptr<DeviceBuffer> memory;
  MatrixView embedding;  // (vocab, embedding)
  MatrixView embedding_projection;
  std::vector<PredictorBlock> blocks;
  NormWeights final_norm;
  LinearWeights head;  // (outputs, hidden)
};

struct PredictorFile {
  std::string path;
  PredictorShape shape;
  std::string model;  // its name, for people
  std::string model_id;
  std::string tokenizer_hash;
  PredictorWeights weights;
};

// FileError where it cannot be read; FormatError where it is not a predictor, is damaged, or is of
// another model than `expected`.
PredictorFile read_predictor(const std::filesystem::path& path, const ExpectedModel& expected,
                             Backend& cpu);

}  // namespace moerun
