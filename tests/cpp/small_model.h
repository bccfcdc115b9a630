// Small models of random weights, written to a folder: a layer of one MLP, then layers with experts
// and a shared one.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "random_weights.h"
#include "temp_folder.h"

namespace moerun::test {

struct SmallModel {
  std::size_t layers = 3;
  std::size_t dense_layers = 1;  // the first ones
  std::size_t experts = 10;
  std::size_t top_k = 3;
  std::size_t hidden = 48;
  std::size_t intermediate = 72;  // of an expert
  std::size_t vocab = 64;
};

inline std::filesystem::path write_small_model(const TempFolder& folder, const SmallModel& size) {
  std::string header = "{";
  std::string data;
  RandomWeights random(5);
  const auto add = [&](const std::string& name, std::size_t rows, std::size_t cols) {
    std::vector<float> values;
    for (std::size_t i = 0; i < rows * std::max<std::size_t>(cols, 1); ++i) {
      values.push_back(random.value());
    }
    const auto bytes = encode(values, DType::bf16);
    const std::string shape = std::to_string(rows) + (cols == 0 ? "" : "," + std::to_string(cols));
    header += (header.size() == 1 ? "\"" : ",\"") + name + "\":{\"dtype\":\"BF16\",\"shape\":[" +
              shape + "],\"data_offsets\":[" + std::to_string(data.size()) + "," +
              std::to_string(data.size() + bytes.size()) + "]}";
    data.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  };
  const auto add_mlp = [&](const std::string& prefix, std::size_t records) {
    add(prefix + "gate_proj.weight", records, size.hidden);
    add(prefix + "up_proj.weight", records, size.hidden);
    add(prefix + "down_proj.weight", size.hidden, records);
  };
  add("model.embed_tokens.weight", size.vocab, size.hidden);
  std::string dense;
  for (std::size_t layer = 0; layer < size.layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "input_layernorm.weight", size.hidden, 0);
    add(prefix + "post_attention_layernorm.weight", size.hidden, 0);
    for (const char* name : {"q", "k", "v"}) {
      add(prefix + "self_attn." + name + "_proj.weight", size.hidden, size.hidden);
      add(prefix + "self_attn." + name + "_proj.bias", size.hidden, 0);
    }
    add(prefix + "self_attn.o_proj.weight", size.hidden, size.hidden);
    if (layer < size.dense_layers) {
      dense += (dense.empty() ? "" : ",") + std::to_string(layer);
      add_mlp(prefix + "mlp.", 2 * size.intermediate);
      continue;
    }
    add(prefix + "mlp.gate.weight", size.experts, size.hidden);
    for (std::size_t expert = 0; expert < size.experts; ++expert) {
      add_mlp(prefix + "mlp.experts." + std::to_string(expert) + ".", size.intermediate);
    }
    add_mlp(prefix + "mlp.shared_expert.", 40);
    add(prefix + "mlp.shared_expert_gate.weight", 1, size.hidden);
  }
  add("model.norm.weight", size.hidden, 0);
  add("lm_head.weight", size.vocab, size.hidden);
  folder.write("model.safetensors", safetensors_bytes(header + "}", data));
  const auto field = [](const char* name, std::size_t value) {
    return ",\"" + std::string(name) + "\":" + std::to_string(value);
  };
  folder.write("config.json",
               "{\"model_type\":\"qwen2_moe\",\"architectures\":[\"Qwen2MoeForCausalLM\"],"
               "\"torch_dtype\":\"bfloat16\",\"hidden_act\":\"silu\",\"rms_norm_eps\":1e-6,"
               "\"rope_theta\":10000.0,\"tie_word_embeddings\":false,\"norm_topk_prob\":true,"
               "\"mlp_only_layers\":[" +
                   dense + "]" + field("vocab_size", size.vocab) +
                   field("hidden_size", size.hidden) + field("num_hidden_layers", size.layers) +
                   field("num_attention_heads", 3) + field("num_key_value_heads", 3) +
                   field("num_experts", size.experts) + field("num_experts_per_tok", size.top_k) +
                   field("moe_intermediate_size", size.intermediate) +
                   field("intermediate_size", 2 * size.intermediate) +
                   field("shared_expert_intermediate_size", 40) + field("decoder_sparse_step", 1) +
                   field("max_position_embeddings", 512) + "}");
  return folder.path();
}

}  // namespace moerun::test
