#include "expert/host_plan.h"

#include <algorithm>

#include "base/bytes_text.h"
#include "base/error.h"
#include "expert/budget_text.h"

namespace moerun {
namespace {

// Large enough to reach the speed of the link.
constexpr std::size_t kBlockBytes = std::size_t{2} << 20;
// Some being read, some being copied.
constexpr std::size_t kBlocks = 16;
// Of the checkpoint an expert is read whole: any part of it costs all of its down_proj.
constexpr std::size_t kWholeExpertBytes = std::size_t{256} << 20;
constexpr std::size_t kMinWholeExperts = 2;
constexpr std::size_t kMaxWholeExperts = 8;

constexpr std::size_t kMinReserveBytes = std::size_t{256} << 20;

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

HostTier parse_tier(const std::string& text) {
  if (text.empty() || text == "auto") return HostTier::automatic;
  if (text == "memory") return HostTier::memory;
  if (text == "disk") return HostTier::disk;
  throw InvalidArgument(message("host_tier: expected auto, memory or disk, found '", text, "'"));
}

// Gives `bytes` to the layers in equal shares of what each still has; adds the experts to `share`.
void share_out(HostPlan& plan, const ModelWeights& weights, std::size_t HostShare::* share,
               std::size_t bytes) {
  const auto left = [&](std::size_t layer) {
    const HostShare& taken = plan.layers[layer];
    return weights.layers[layer].experts.num_experts - taken.page_locked - taken.pageable;
  };
  double wanted = 0;
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    wanted += static_cast<double>(left(i) * weights.layers[i].bytes_per_expert());
  }
  if (wanted == 0) return;
  const double part = std::min(1.0, static_cast<double>(bytes) / wanted);
  std::size_t used = 0;
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const auto count = static_cast<std::size_t>(part * static_cast<double>(left(i)));
    plan.layers[i].*share += count;
    used += count * weights.layers[i].bytes_per_expert();
  }
  // What rounding left over: one more for the first layers.
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const std::size_t each = weights.layers[i].bytes_per_expert();
    if (left(i) == 0 || used + each > bytes) continue;
    plan.layers[i].*share += 1;
    used += each;
  }
}

void count_bytes(HostPlan& plan, const ModelWeights& weights) {
  plan.page_locked_bytes = 0;
  plan.pageable_bytes = 0;
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const std::size_t each = weights.layers[i].bytes_per_expert();
    plan.page_locked_bytes += plan.layers[i].page_locked * each;
    plan.pageable_bytes += plan.layers[i].pageable * each;
  }
  plan.disk_bytes = weights.expert_bytes() - plan.page_locked_bytes - plan.pageable_bytes;
}

void size_ring(HostPlan& plan, const ModelWeights& weights, const ExpertCacheOptions& options) {
  std::size_t record = 0;
  std::size_t expert = 0;
  for (std::size_t i = 0; i < plan.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    if (plan.layers[i].page_locked == layer.experts.num_experts) continue;
    record = std::max(record, layer.record_bytes());
    expert = std::max(expert, layer.bytes_per_expert());
  }
  plan.ring_block_bytes = 0;
  plan.ring_blocks = 0;
  if (expert == 0) return;
  std::size_t block = std::min(kBlockBytes, expert);
  if (options.host_ring_bytes != 0) block = std::min(block, options.host_ring_bytes / 2);
  // Whole records, so that every block starts where one may.
  plan.ring_block_bytes = std::max<std::size_t>(1, block / record) * record;
  if (options.host_ring_bytes != 0) {
    plan.ring_blocks = std::max<std::size_t>(2, options.host_ring_bytes / plan.ring_block_bytes);
    return;
  }
  plan.ring_blocks = kBlocks;
  if (plan.disk_bytes != 0 && options.pack_folder.empty()) {
    const std::size_t experts =
        std::clamp(kWholeExpertBytes / expert, kMinWholeExperts, kMaxWholeExperts);
    plan.ring_blocks =
        std::max(plan.ring_blocks, experts * divide_up(expert, plan.ring_block_bytes));
  }
}

}  // namespace

std::string_view name_of(HostTier tier) {
  return tier == HostTier::memory ? "memory" : tier == HostTier::disk ? "disk" : "auto";
}

void plan_the_rest(HostPlan& plan, const ModelWeights& weights, const ExpertCacheOptions& options) {
  for (HostShare& layer : plan.layers) layer.pageable = 0;
  count_bytes(plan, weights);
  const std::size_t room = plan.usable_bytes - std::min(plan.usable_bytes, plan.page_locked_bytes);
  if (plan.tier == HostTier::memory) {
    share_out(plan, weights, &HostShare::pageable, plan.disk_bytes);
  } else if (plan.tier == HostTier::automatic) {
    share_out(plan, weights, &HostShare::pageable, std::min(room, plan.disk_bytes));
  }
  count_bytes(plan, weights);
  size_ring(plan, weights, options);
}

void check_host_options(const ModelWeights& weights, const ExpertCacheOptions& options) {
  parse_tier(options.host_tier);
  if (!options.pin_limit.empty()) parse_pin_limit(options.pin_limit, weights.expert_bytes());
}

HostPlan plan_host_memory(const ModelWeights& weights, const ExpertCacheOptions& options,
                          std::size_t available_bytes) {
  HostPlan plan;
  plan.tier = parse_tier(options.host_tier);
  plan.layers.resize(weights.layers.size());
  const std::size_t total = weights.expert_bytes();
  const std::size_t reserve = std::max(available_bytes / 10, kMinReserveBytes);
  const std::size_t loading = weights.resident_bytes();
  plan.usable_bytes = available_bytes - std::min(available_bytes, reserve + loading);
  plan.pin_limit_bytes = !options.pin_limit.empty()    ? parse_pin_limit(options.pin_limit, total)
                         : plan.tier == HostTier::disk ? 0
                                                       : total;
  const std::size_t wanted = std::min(plan.pin_limit_bytes, total);
  share_out(plan, weights, &HostShare::page_locked, std::min(wanted, plan.usable_bytes));
  plan_the_rest(plan, weights, options);
  if (plan.tier == HostTier::memory && total + loading > available_bytes) {
    throw OutOfMemory(message("host_tier: memory was asked for, but the experts need ",
                              bytes_text(total), " and the other weights ", bytes_text(loading),
                              " while they are loaded, and ", bytes_text(available_bytes),
                              " are free; use auto or disk"));
  }
  if (wanted > plan.usable_bytes) {
    plan.notes.push_back(
        message("of ", bytes_text(total), " of experts only ", bytes_text(plan.page_locked_bytes),
                " can be page-locked in the memory that is free: ", bytes_text(plan.pageable_bytes),
                " are in pageable memory and ", bytes_text(plan.disk_bytes),
                " on disk, from where copying to the device is slower"));
  }
  return plan;
}

}  // namespace moerun
