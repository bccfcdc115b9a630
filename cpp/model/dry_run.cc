#include "model/dry_run.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/checkpoint.h"
#include "model/cache_report.h"
#include "model/kv_cache.h"

namespace moerun {

std::string dry_run_json(const std::filesystem::path& path, const ModelOptions& options) {
  const ModelPlan plan = plan_model(path, options);
  const ModelConfig& config = plan.config;
  const CacheLayout& layout = plan.layout();
  const MemoryPlan& memory = plan.memory;
  std::size_t expert_bytes = 0;
  for (const LayerWeights& layer : plan.weights->layers) {
    if (layer.experts.num_experts != 0) {
      expert_bytes = std::max(expert_bytes, layer.bytes_per_expert());
    }
  }
  nlohmann::ordered_json json;
  json["model"] = path.string();
  json["device"] = plan.device.device;
  json["device_reason"] = plan.device.reason;
  json["state"] = layout.is_resident ? "resident" : "cached";
  json["policy"] =
      layout.is_resident ? nlohmann::ordered_json(nullptr) : nlohmann::ordered_json(layout.policy);
  json["prefetch"] = name_of(layout.prefetch);
  json["resident_bytes"] = plan.weights->resident_bytes();
  json["total_expert_bytes"] = plan.weights->expert_bytes();
  json["budget_bytes"] = layout.budget_bytes;
  json["arena_bytes"] = layout.is_resident ? plan.weights->expert_bytes() : layout.arena_bytes();
  json["slot_bytes"] = layout.slot_bytes();
  json["ring_bytes"] = layout.ring_bytes();
  json["host"] = host_json(plan.host ? &*plan.host : nullptr);
  json["smallest_budget_bytes"] = layout.smallest_budget_bytes;
  json["kv_cache_bytes_at_full_context"] = KvCache::bytes_for(config, plan.context_length);
  json["activation_bytes"] = memory.needs.activations;
  json["scratch_bytes"] = memory.needs.scratch;
  json["reserve_bytes"] = memory.needs.reserve;
  json["left_for_experts_bytes"] = memory.left_for_experts;
  json["device_free_bytes"] = memory.memory.free_bytes;
  json["device_total_bytes"] = memory.memory.total_bytes;
  json["available_bytes"] = available_memory_bytes();
  json["num_moe_layers"] = plan.weights->num_moe_layers();
  json["num_experts"] = config.num_experts;
  json["top_k"] = config.top_k;
  json["expert_bytes_each"] = expert_bytes;
  json["layers"] = nlohmann::ordered_json::array();
  for (const LayerLayout& layer : layout.layers) {
    json["layers"].push_back({{"layer", layer.layer},
                              {"slots", layer.num_slots},
                              {"split", layer.split},
                              {"slot_bytes", layer.slot_bytes}});
  }
  // The path may be in any encoding.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace moerun
