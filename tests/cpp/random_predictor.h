// Files of small random predictors, whole ones and such as somebody has spoilt.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "predict/predictor_file.h"
#include "temp_folder.h"

namespace moerun::test {

struct PredictorTensor {
  std::string dtype;
  std::vector<std::size_t> shape;
  std::vector<float> values;  // as they are stored
};

// Two layers of five experts; attention sees six tokens.
struct RandomPredictor {
  std::map<std::string, std::string> metadata;
  std::vector<std::pair<std::string, PredictorTensor>> tensors;

  explicit RandomPredictor(std::uint64_t seed = 1) : random_(seed) {
    metadata = {{"format", "moerun-predictor"},
                {"version", "1"},
                {"model", "some model"},
                {"model_id", "0123456789abcdef"},
                {"tokenizer_hash", std::string(64, 'a')},
                {"vocab_size", "11"},
                {"moe_layers", "[1,3]"},
                {"num_experts", "5"},
                {"top_k", "2"},
                {"embedding_size", "32"},
                {"hidden_size", "64"},
                {"mlp_size", "96"},
                {"num_blocks", "2"},
                {"num_heads", "4"},
                {"window", "6"},
                {"training", "{}"}};
    matrix("embedding.weight", 11, 32);
    matrix("embedding_projection.weight", 64, 32);
    for (const std::string at : {"blocks.0.", "blocks.1."}) {
      vector(at + "attention_norm.weight", 64);
      matrix(at + "qkv.weight", 192, 64);
      matrix(at + "attention_output.weight", 64, 64);
      vector(at + "mlp_norm.weight", 64);
      matrix(at + "mlp_up.weight", 96, 64);
      matrix(at + "mlp_down.weight", 64, 96);
    }
    vector("final_norm.weight", 64);
    matrix("head.weight", 10, 64);
    vector("head.bias", 10);
    tensors.emplace_back("trained_sequences", PredictorTensor{"I64", {0}, {}});
  }

  PredictorTensor& tensor(const std::string& name) {
    for (auto& [each, tensor] : tensors) {
      if (each == name) return tensor;
    }
    throw std::runtime_error("no tensor " + name);
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const auto& each) { return each.first == name; });
  }

  std::string bytes() const {
    std::string header = R"({"__metadata__":{)";
    for (const auto& [key, value] : metadata) {
      header += (header.back() == '{' ? "\"" : ",\"") + key + "\":\"" + value + "\"";
    }
    header += "}";
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      const std::size_t begin = data.size();
      append(tensor, data);
      header += ",\"" + name + R"(":{"dtype":")" + tensor.dtype + R"(","shape":[)";
      for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
        header += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
      }
      header += R"(],"data_offsets":[)" + std::to_string(begin) + "," +
                std::to_string(data.size()) + "]}";
    }
    return safetensors_bytes(header + "}", data);
  }

 private:
  void matrix(const std::string& name, std::size_t rows, std::size_t cols) {
    PredictorTensor tensor{"BF16", {rows, cols}, {}};
    for (std::size_t i = 0; i < rows * cols; ++i) {
      // Eight bits, so that bf16 holds them exactly.
      tensor.values.push_back(static_cast<float>(static_cast<int>(random_() % 255) - 127) / 512.0f);
    }
    tensors.emplace_back(name, std::move(tensor));
  }
  void vector(const std::string& name, std::size_t size) {
    PredictorTensor tensor{"F32", {size}, {}};
    for (std::size_t i = 0; i < size; ++i) {
      tensor.values.push_back(0.5f + static_cast<float>(random_() % 1000) / 1000.0f);
    }
    tensors.emplace_back(name, std::move(tensor));
  }

  static void append(const PredictorTensor& tensor, std::string& data) {
    for (const float value : tensor.values) {
      std::uint32_t bits = 0;
      std::memcpy(&bits, &value, sizeof(bits));
      if (tensor.dtype != "F32") bits >>= 16;
      for (int i = 0; i < (tensor.dtype == "F32" ? 4 : 2); ++i) {
        data += static_cast<char>(bits >> (8 * i) & 0xffu);
      }
    }
  }

  std::mt19937_64 random_;
};

}  // namespace moerun::test
