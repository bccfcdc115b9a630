#include "weights/tensor_names.h"

namespace moerun {
namespace {

bool uses_block_sparse_moe(const ModelConfig& config) {
  return config.model_type == "mixtral" || config.model_type == "phimoe" ||
         config.model_type == "granitemoe";
}

}  // namespace

std::string TensorNames::layer(std::int64_t layer, const std::string& part) const {
  return "model.layers." + std::to_string(layer) + "." + part;
}

std::string TensorNames::present(const std::vector<std::string>& candidates) const {
  for (const auto& name : candidates) {
    if (checkpoint_.find(name) != nullptr) return name;
  }
  return candidates.front();
}

std::string TensorNames::router(std::int64_t index) const {
  const std::string mlp = layer(index, "mlp.");
  const std::string block = layer(index, "block_sparse_moe.");
  if (config_.model_type == "granitemoe") {
    return present({block + "router.layer.weight", block + "router.weight"});
  }
  if (uses_block_sparse_moe(config_)) {
    return present({block + "gate.weight", mlp + "gate.weight", mlp + "router.weight"});
  }
  return mlp + "gate.weight";
}

TensorNames::Experts TensorNames::experts(std::int64_t index) const {
  const std::string mlp = layer(index, "mlp.experts.");
  const std::string block = layer(index, "block_sparse_moe.");
  Experts found;
  found.gate_up = present(
      {block + "input_linear.weight", mlp + "gate_up_proj", block + "experts.gate_up_proj"});
  found.down =
      present({block + "output_linear.weight", mlp + "down_proj", block + "experts.down_proj"});
  found.fused = config_.model_type == "granitemoe" || checkpoint_.find(found.gate_up) != nullptr;
  return found;
}

std::string TensorNames::expert(std::int64_t index, std::int64_t expert,
                                const std::string& projection) const {
  const std::string number = "experts." + std::to_string(expert) + ".";
  const std::string mlp = layer(index, "mlp.") + number + projection + "_proj.weight";
  if (!uses_block_sparse_moe(config_)) return mlp;
  const std::string old = projection == "gate" ? "w1" : projection == "up" ? "w3" : "w2";
  return present({layer(index, "block_sparse_moe.") + number + old + ".weight", mlp});
}

}  // namespace moerun
