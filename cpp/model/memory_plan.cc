#include "model/memory_plan.h"

#include <algorithm>

#include "base/bytes_text.h"
#include "base/error.h"
#include "device/device_messages.h"
#include "model/kv_cache.h"
#include "model/workspace.h"

namespace moerun {
namespace {

constexpr std::size_t kReserveBytes = std::size_t{256} << 20;
// Some six blocks a layer, of which each loses 1 MiB on average where pages have two.
constexpr std::size_t kRoundedPerLayer = std::size_t{6} << 20;
// A small card cannot spare as much.
constexpr std::size_t kMaxReserveShare = 16;
// A context is seldom used to its end, and on the host a KV cache takes memory only as it fills.
constexpr std::size_t kMaxHostKvReserve = std::size_t{1} << 30;

MemoryNeeds needs_on_host(const ModelConfig& config, const ModelWeights& weights,
                          std::size_t context_length) {
  MemoryNeeds needs;
  needs.weights = weights.resident_bytes();
  needs.kv_cache = std::min(KvCache::bytes_for(config, context_length), kMaxHostKvReserve);
  needs.reserve = kReserveBytes;
  return needs;
}

MemoryNeeds needs_on_device(const ModelConfig& config, const ModelWeights& weights,
                            std::size_t context_length, std::size_t max_tokens,
                            const Backend& backend, const MemoryState& memory) {
  PassShape shape;
  shape.tokens = max_tokens;
  shape.kv_capacity = context_length;
  shape.attention = {static_cast<std::size_t>(config.num_attention_heads),
                     static_cast<std::size_t>(config.num_key_value_heads),
                     static_cast<std::size_t>(config.head_dim)};
  for (const LayerWeights& layer : weights.layers) {
    const std::size_t routed =
        layer.experts.num_experts != 0 ? static_cast<std::size_t>(config.top_k) : 0;
    shape.layers.push_back({layer.experts, routed + (layer.has_shared_expert() ? 1 : 0)});
  }
  MemoryNeeds needs;
  needs.weights = weights.resident_bytes();
  needs.kv_cache = KvCache::bytes_for(config, context_length);
  needs.activations = Workspace::device_bytes_for(config, max_tokens);
  needs.scratch = backend.scratch_bytes_for(shape);
  // Devices round every block of memory up, and note every page of the host's that is page-locked.
  const std::size_t extra = kRoundedPerLayer * weights.layers.size() + weights.expert_bytes() / 512;
  needs.reserve = std::min(kReserveBytes + extra, memory.total_bytes / kMaxReserveShare);
  return needs;
}

std::size_t difference(std::size_t a, std::size_t b) { return a > b ? a - b : 0; }

std::string without_kv_cache_text(const MemoryNeeds& needs) {
  return message(bytes_text(needs.weights), " for weights, ",
                 bytes_text(needs.activations + needs.scratch),
                 " for activations and scratch memory, ", bytes_text(needs.reserve), " in reserve");
}

// The KV cache must leave room for the fewest experts that work.
void check_context(const ModelConfig& config, std::size_t context_length, const MemoryPlan& plan,
                   std::size_t smallest_budget) {
  const MemoryNeeds& needs = plan.needs;
  const std::size_t fixed = needs.total() - needs.kv_cache + smallest_budget;
  const std::size_t room = difference(plan.memory.free_bytes, fixed);
  if (plan.memory.free_bytes >= fixed && room >= needs.kv_cache) return;
  const std::string beside = message("the model also needs ", without_kv_cache_text(needs),
                                     " and at least ", bytes_text(smallest_budget, Rounding::up),
                                     " for experts, and ", memory_state_text(plan.memory));
  const std::size_t fitting = room / std::max<std::size_t>(KvCache::bytes_for(config, 1), 1);
  if (fitting == 0) {
    throw OutOfMemory(
        message("the device has too little memory for this model with any context: ", beside,
                "; free memory there, give a smaller prefill_chunk, or use another device"));
  }
  throw OutOfMemory(message("context_length ", context_length, ": the KV cache takes ",
                            bytes_text(needs.kv_cache), " of device memory, but ", beside,
                            "; a context_length of up to ", fitting, " fits"));
}

void check_budget(const ModelWeights& weights, std::size_t context_length, const MemoryPlan& plan) {
  const CacheLayout& layout = plan.layout;
  const std::size_t asked = layout.is_resident ? weights.expert_bytes() : layout.arena_bytes();
  if (asked <= plan.left_for_experts) return;
  throw OutOfMemory(
      message("the expert budget asks for ", bytes_text(asked), " of device memory, but ",
              bytes_text(plan.left_for_experts), " are left for experts: the model also needs ",
              without_kv_cache_text(plan.needs), " and ", bytes_text(plan.needs.kv_cache),
              " for the KV cache (context_length ", context_length, "), and ",
              memory_state_text(plan.memory), "; a budget of up to ",
              bytes_text(plan.left_for_experts, Rounding::down), " fits"));
}

}  // namespace

MemoryPlan plan_memory(const ModelConfig& config, const ModelWeights& weights,
                       std::size_t context_length, std::size_t prefill_chunk,
                       const ExpertCacheOptions& options, const Backend& backend) {
  MemoryPlan plan;
  plan.memory = backend.memory();
  plan.needs = backend.is_host()
                   ? needs_on_host(config, weights, context_length)
                   : needs_on_device(config, weights, context_length,
                                     std::min(prefill_chunk, context_length), backend, plan.memory);
  plan.left_for_experts = difference(plan.memory.free_bytes, plan.needs.total());
  const auto layout_in = [&](std::size_t available) {
    return make_cache_layout(weights, static_cast<std::size_t>(config.top_k), options, available);
  };
  if (!backend.is_host()) {
    // With memory without end, for what the smallest budget would be.
    const CacheLayout unbounded = layout_in(static_cast<std::size_t>(-1));
    check_context(config, context_length, plan, unbounded.smallest_budget_bytes);
  }
  plan.layout = layout_in(plan.left_for_experts);
  if (!backend.is_host()) check_budget(weights, context_length, plan);
  return plan;
}

}  // namespace moerun
