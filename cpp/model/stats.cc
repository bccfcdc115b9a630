#include "model/stats.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/version.h"
#include "device/cpu/kernel_table.h"
#include "device/cuda_query.h"
#include "model/batch_report.h"
#include "model/cache_report.h"

namespace moerun {
namespace {

using Json = nlohmann::ordered_json;

Json rate(double amount, double seconds) {
  return amount > 0 && seconds > 0 ? Json(amount / seconds) : Json(nullptr);
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}

}  // namespace

std::string stats_json(const Model& model) {
  const Model::Use use(model);
  const LoadStats& load = model.load_stats();
  const auto generation = model.generation_stats();
  const GenerationStats last = generation.value_or(GenerationStats{});
  const auto load_bytes = static_cast<double>(load.bytes);
  const auto decoded =
      last.generated_tokens > 1 ? static_cast<double>(last.generated_tokens - 1) : 0.0;
  const auto decode_bytes = static_cast<double>(last.decode_bytes);

  Json stats;
  stats["device"] = model.device();
  stats["device_reason"] = model.device_reason();
  stats["cpu_kernels"] = model.cpu_kernels();
  stats["threads"] = model.threads();
  const ThreadUse use_of_threads = model.thread_use();
  const bool is_measured = use_of_threads.seconds > 0;
  stats["threads_at_work"] = is_measured ? Json(use_of_threads.mean_threads()) : Json(nullptr);
  stats["threads_withheld"] = is_measured ? Json(use_of_threads.mean_withheld()) : Json(nullptr);
  stats["load"] = {{"seconds", load.seconds},
                   {"bytes", load.bytes},
                   {"gb_per_s", rate(load_bytes / 1e9, load.seconds)},
                   {"notes", load.notes}};
  stats["memory"] = {{"resident_bytes", model.resident_bytes()},
                     {"expert_bytes", model.expert_memory_bytes()},
                     {"kv_cache_bytes", last.kv_cache_bytes},
                     {"scratch_bytes", last.scratch_bytes}};
  stats["cache"] = cache_json(model);
  stats["prompt_tokens"] = generation ? Json(last.prompt_tokens) : Json(nullptr);
  stats["generated_tokens"] = generation ? Json(last.generated_tokens) : Json(nullptr);
  stats["ttft_s"] = generation ? Json(last.ttft_seconds) : Json(nullptr);
  stats["prefill_tokens_per_s"] =
      rate(static_cast<double>(last.prompt_tokens), last.prefill_seconds);
  stats["decode_tokens_per_s"] = rate(decoded, last.decode_seconds);
  stats["decode_bytes_per_token"] = rate(decode_bytes, decoded);
  stats["decode_gb_per_s"] = rate(decode_bytes / 1e9, last.decode_seconds);
  const auto batch = model.batch_stats();
  stats["batch"] = batch ? batch_json(*batch) : Json(nullptr);
  stats["logits_hash"] = generation ? Json(hex(last.logits_hash)) : Json(nullptr);
  // A path in a note may be in any encoding.
  return stats.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string config_json(const ModelConfig& config) {
  Json json;
  json["model_type"] = config.model_type;
  json["vocab_size"] = config.vocab_size;
  json["hidden_size"] = config.hidden_size;
  json["num_hidden_layers"] = config.num_hidden_layers;
  json["num_moe_layers"] = config.num_moe_layers();
  json["num_attention_heads"] = config.num_attention_heads;
  json["num_key_value_heads"] = config.num_key_value_heads;
  json["head_dim"] = config.head_dim;
  json["max_position_embeddings"] = config.max_position_embeddings;
  json["num_experts"] = config.num_experts;
  json["top_k"] = config.top_k;
  json["moe_intermediate_size"] = config.moe_intermediate_size;
  json["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size;
  json["norm_topk_prob"] = config.norm_topk_prob;
  json["tie_word_embeddings"] = config.tie_word_embeddings;
  json["eos_token_ids"] = config.eos_token_ids;
  json["dtype"] = config.dtype;
  json["runnable"] = config.not_runnable.empty();
  return json.dump();
}

std::string build_info_json() {
  const CudaInfo cuda = query_cuda();
  Json json;
  json["version"] = version();
  json["cpu_kernels"] = {{"compiled", compiled_cpu_kernels()},
                         {"supported", supported_cpu_kernels()},
                         {"chosen", std::string(choose_cpu_kernels("auto").name)}};
  json["cuda"] = {{"compiled", cuda.compiled},
                  {"available", cuda.available},
                  {"reason", cuda.reason},
                  {"driver_version", cuda.driver_version},
                  {"runtime_version", cuda.runtime_version},
                  {"devices", Json::array()}};
  for (const CudaDevice& device : cuda.devices) {
    json["cuda"]["devices"].push_back(
        {{"name", device.name},
         {"compute_capability",
          message(device.compute_capability_major, ".", device.compute_capability_minor)},
         {"memory_bytes", device.total_memory_bytes}});
  }
  json["cuda_architectures"] = cuda.architectures;
  return json.dump();
}

}  // namespace moerun
