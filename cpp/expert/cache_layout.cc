#include "expert/cache_layout.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/bytes_text.h"
#include "base/error.h"
#include "expert/budget_text.h"
#include "expert/cache_plan.h"
#include "expert/policy.h"

namespace moerun {
namespace {

// Where no split is given. A top segment is worth its memory if the bottom one can arrive while it
// computes. From a disk it cannot: experts are computed at some 30 GB/s and read at 1.5, so the
// memory is better spent on whole experts (docs/benchmarks.md).
constexpr double kDefaultSplit = 1.0;
constexpr std::size_t kBlocksPerExpert = 8;
constexpr std::string_view kPredictive = "predictive";

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// To whole quanta: 1 is all of the expert, and what is not 0 is at least one quantum.
std::size_t top_records_of(double split, std::size_t records) {
  if (split <= 0) return 0;
  if (split >= 1) return records;
  const double quanta = std::round(split * static_cast<double>(records) / kQuantumRecords);
  return std::min(records,
                  std::max<std::size_t>(1, static_cast<std::size_t>(quanta)) * kQuantumRecords);
}

// What the layout of one layer is made from.
struct LayerSize {
  std::size_t layer;
  std::size_t num_experts;
  std::size_t records;  // of an expert
  std::size_t record_bytes;
};

std::vector<LayerSize> layer_sizes(const ModelWeights& weights) {
  std::vector<LayerSize> sizes;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    if (layer.experts.num_experts == 0) continue;
    sizes.push_back(
        {i, layer.experts.num_experts, layer.experts.intermediate_size, layer.record_bytes()});
  }
  return sizes;
}

LayerLayout layer_layout(const LayerSize& size, std::size_t slots, std::size_t top_records) {
  LayerLayout layout;
  layout.layer = size.layer;
  layout.num_slots = top_records == 0 ? 0 : std::min(slots, size.num_experts);
  layout.top_records = layout.num_slots == 0 ? 0 : top_records;
  layout.split = static_cast<double>(layout.top_records) /
                 static_cast<double>(std::max<std::size_t>(size.records, 1));
  layout.slot_bytes = layout.top_records * size.record_bytes;
  return layout;
}

void size_ring(CacheLayout& layout, const std::vector<LayerSize>& sizes, std::size_t top_k,
               std::size_t ring_experts) {
  std::size_t blocks_per_expert = 0;
  for (const LayerSize& size : sizes) {
    const std::size_t quanta = divide_up(size.records, kQuantumRecords);
    // Experts that stay in a pool are read and computed in one piece.
    const std::size_t blocks = layout.is_pool ? 1 : kBlocksPerExpert;
    const std::size_t records = divide_up(quanta, blocks) * kQuantumRecords;
    layout.block_bytes = std::max(layout.block_bytes, records * size.record_bytes);
  }
  for (const LayerSize& size : sizes) {
    const std::size_t block_records =
        layout.block_bytes / (size.record_bytes * kQuantumRecords) * kQuantumRecords;
    blocks_per_expert = std::max(blocks_per_expert, divide_up(size.records, block_records));
  }
  const std::size_t experts = ring_experts != 0 ? ring_experts : top_k;
  layout.num_blocks = experts * blocks_per_expert;
}

std::string share_text(std::size_t bytes, std::size_t total) {
  const double percent =
      std::ceil(1000.0 * static_cast<double>(bytes) / static_cast<double>(total)) / 10;
  return message(bytes_text(bytes, Rounding::up), " (", percent, "% of all experts)");
}

void check_split(const std::vector<double>& split, std::size_t num_layers) {
  if (split.size() > 1 && split.size() != num_layers) {
    throw InvalidArgument(message("split: expected one number, or one for each of the ", num_layers,
                                  " layers with experts, found ", split.size()));
  }
  for (const double value : split) {
    if (!(value >= 0 && value <= 1)) {
      throw InvalidArgument(message("split: expected 0 to 1, found ", value));
    }
  }
}

// Splits as given, or the default.
std::vector<std::size_t> choose_tops(const std::vector<LayerSize>& sizes,
                                     const std::vector<double>& split) {
  std::vector<std::size_t> tops;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const LayerSize& size = sizes[i];
    const double share = split.empty() ? kDefaultSplit : split.size() == 1 ? split[0] : split[i];
    tops.push_back(top_records_of(share, size.records));
  }
  return tops;
}

void share_out_slots(CacheLayout& layout, const std::vector<LayerSize>& sizes,
                     const std::vector<double>& split, std::size_t bytes) {
  const std::size_t layer_budget = bytes / std::max<std::size_t>(sizes.size(), 1);
  const auto tops = choose_tops(sizes, split);
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::size_t slot_bytes = tops[i] * sizes[i].record_bytes;
    layout.layers.push_back(
        layer_layout(sizes[i], slot_bytes == 0 ? 0 : layer_budget / slot_bytes, tops[i]));
  }
  // What the divisions left over: one slot more for the first layers.
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::size_t slot_bytes = tops[i] * sizes[i].record_bytes;
    const std::size_t slots = layout.layers[i].num_slots;
    if (slot_bytes != 0 && slots < sizes[i].num_experts &&
        layout.slot_bytes() + slot_bytes <= bytes) {
      layout.layers[i] = layer_layout(sizes[i], slots + 1, tops[i]);
    }
  }
}

// All of the budget is the ring's. Slots are counts: of the plan, or equally many.
void share_out_pool(CacheLayout& layout, const std::vector<LayerSize>& sizes) {
  const std::size_t smallest = layout.num_blocks;
  std::size_t total = 0;
  for (const LayerSize& size : sizes) total += size.num_experts;
  layout.num_blocks =
      std::clamp(layout.budget_bytes / layout.block_bytes, smallest, std::max(smallest, total));
  const bool is_planned = !layout.layers.empty();
  std::size_t left = layout.num_blocks - smallest;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::size_t equal = (left + sizes.size() - i - 1) / (sizes.size() - i);
    std::size_t slots = std::min(equal, sizes[i].num_experts);
    if (is_planned) {
      const LayerLayout& planned = layout.layers[i];
      slots = std::min(left, planned.num_slots * planned.top_records / sizes[i].records);
      layout.layers[i] = {};
    } else {
      layout.layers.emplace_back();
    }
    layout.layers[i].layer = sizes[i].layer;
    layout.layers[i].num_slots = slots;
    layout.layers[i].split = 1;
    left -= slots;
  }
}

void apply_plan(CacheLayout& layout, const std::vector<LayerSize>& sizes, const CachePlan& plan,
                const std::string& path) {
  for (const LayerSize& size : sizes) layout.layers.push_back(layer_layout(size, 0, 0));
  std::vector<bool> is_planned(sizes.size(), false);
  for (const PlannedLayer& planned : plan.layers) {
    const auto found = std::find_if(sizes.begin(), sizes.end(), [&](const LayerSize& size) {
      return size.layer == planned.layer;
    });
    if (found == sizes.end()) {
      throw FormatError(message(path, ": layer ", planned.layer, " is not a layer with experts; ",
                                "the model has ", sizes.size(), ", from ", sizes.front().layer,
                                " to ", sizes.back().layer));
    }
    const auto index = static_cast<std::size_t>(found - sizes.begin());
    if (is_planned[index]) {
      throw FormatError(message(path, ": layer ", planned.layer, " is planned twice"));
    }
    is_planned[index] = true;
    if (planned.num_slots > found->num_experts) {
      throw FormatError(message(path, ": layer ", planned.layer, ": expected at most ",
                                found->num_experts, " slots (the number of experts), found ",
                                planned.num_slots));
    }
    for (const auto* experts : {&planned.experts, &planned.warm}) {
      for (const std::size_t expert : *experts) {
        if (expert < found->num_experts) continue;
        throw FormatError(message(path, ": layer ", planned.layer, ": expected experts from 0 to ",
                                  found->num_experts - 1, ", found ", expert));
      }
    }
    if (plan.is_resident && (planned.num_slots != found->num_experts || planned.split != 1)) {
      throw FormatError(message(path, ": layer ", planned.layer,
                                ": resident is true, so that every expert is in memory: expected ",
                                found->num_experts, " slots and split 1, or no layers"));
    }
    layout.layers[index] =
        layer_layout(*found, planned.num_slots, top_records_of(planned.split, found->records));
    if (layout.policy != "static" && !planned.experts.empty()) {
      throw FormatError(message(path, ": layer ", planned.layer,
                                ": experts are listed for the policy static only, found ",
                                layout.policy));
    }
    layout.layers[index].static_experts = planned.experts;
    if (layout.layers[index].num_slots != 0) layout.layers[index].warm_experts = planned.warm;
  }
  if (layout.policy == "off" && layout.slot_bytes() != 0) {
    throw FormatError(
        message(path, ": policy off caches nothing, expected 0 slots in every layer"));
  }
  if (!plan.is_resident && layout.arena_bytes() > layout.budget_bytes) {
    throw FormatError(message(
        path, ": the plan needs ", bytes_text(layout.arena_bytes(), Rounding::up), " (slots ",
        bytes_text(layout.slot_bytes()), ", staging ring ", bytes_text(layout.ring_bytes()),
        "), expected at most its budget_bytes, ", bytes_text(layout.budget_bytes, Rounding::down)));
  }
}

// `where` stands before messages: the plan's path, or nothing.
PrefetchMode parse_prefetch(const std::string& text, const std::string& where) {
  if (text.empty() || text == "auto") return PrefetchMode::automatic;
  if (text == "on") return PrefetchMode::on;
  if (text == "off") return PrefetchMode::off;
  const std::string what = message("prefetch: expected on, off or auto, found '", text, "'");
  if (!where.empty()) throw FormatError(where + ": " + what);
  throw InvalidArgument(what);
}

void check_policy(const std::string& policy, const std::string& where) {
  const auto& names = cache_policy_names();
  if (policy == "off" || policy == kPredictive ||
      std::find(names.begin(), names.end(), policy) != names.end())
    return;
  const std::string what =
      message("policy: expected off, lru, lfu, lcp, static or predictive, found '", policy, "'");
  if (!where.empty()) throw FormatError(where + ": " + what);
  throw InvalidArgument(what);
}

}  // namespace

std::string_view name_of(PrefetchMode mode) {
  return mode == PrefetchMode::on ? "on" : mode == PrefetchMode::off ? "off" : "auto";
}

std::size_t CacheLayout::slot_bytes() const {
  std::size_t total = 0;
  for (const LayerLayout& layer : layers) total += layer.num_slots * layer.slot_bytes;
  return total;
}

CacheLayout make_cache_layout(const ModelWeights& weights, std::size_t top_k,
                              const ExpertCacheOptions& options, std::size_t available_bytes) {
  const std::vector<LayerSize> sizes = layer_sizes(weights);
  const std::size_t total = weights.expert_bytes();
  CacheLayout layout;
  std::optional<CachePlan> plan;
  if (!options.plan.empty()) {
    const bool has_policy = !options.policy.empty() && options.policy != kPredictive;
    if (!options.budget.empty() || has_policy || !options.split.empty()) {
      throw InvalidArgument(
          "plan: it says the budget, the policy and the split; give either a plan "
          "or those (the policy predictive goes with a plan)");
    }
    plan = options.plan_text.empty() ? read_cache_plan(options.plan)
                                     : parse_cache_plan(options.plan_text, options.plan);
  }
  layout.policy = !options.policy.empty() ? options.policy : plan ? plan->policy : "lcp";
  check_policy(layout.policy, options.plan);
  layout.is_pool = layout.policy == kPredictive;
  layout.prefetch = plan && options.prefetch.empty() ? parse_prefetch(plan->prefetch, options.plan)
                                                     : parse_prefetch(options.prefetch, "");
  if (layout.policy == "off" && !options.split.empty()) {
    throw InvalidArgument("split: with policy off nothing is cached; leave one of the two out");
  }
  if (layout.is_pool && !options.split.empty()) {
    throw InvalidArgument(
        "split: the policy predictive keeps whole experts; leave one of the two out");
  }
  if (layout.policy == "off" && layout.prefetch == PrefetchMode::on) {
    throw InvalidArgument(
        "prefetch: policy off is the plain path without it; for prefetch without "
        "a cache, choose another policy and split 0");
  }
  if (layout.policy == "static" && !plan) {
    throw InvalidArgument("policy: static needs a plan that lists the experts of every layer");
  }
  if (sizes.empty() || total == 0) {
    if (plan) throw FormatError(message(options.plan, ": the model has no layers with experts"));
    layout.is_resident = true;
    layout.is_pool = false;
    layout.policy = "off";
    return layout;
  }
  check_split(options.split, sizes.size());
  layout.top_k = top_k;
  size_ring(layout, sizes, top_k, options.ring_experts);
  layout.smallest_budget_bytes = std::min(layout.ring_bytes(), total);
  layout.budget_bytes = plan                     ? plan->budget_bytes
                        : options.budget.empty() ? std::min(available_bytes, total)
                                                 : parse_budget(options.budget, total);
  if (plan && plan->is_resident) {
    apply_plan(layout, sizes, *plan, options.plan);
    if (layout.budget_bytes < total) {
      throw FormatError(message(options.plan, ": resident is true, but all experts take ",
                                bytes_text(total, Rounding::up),
                                ": expected at least as many budget_bytes, found ",
                                bytes_text(layout.budget_bytes, Rounding::down)));
    }
    layout.layers.clear();
  }
  if (plan ? plan->is_resident : layout.budget_bytes >= total) {
    layout.is_resident = true;
    layout.is_pool = false;
    layout.budget_bytes = total;
    layout.num_blocks = 0;
    return layout;
  }
  if (layout.budget_bytes < layout.smallest_budget_bytes) {
    const std::string where = plan ? options.plan + ": " : "";
    throw OutOfMemory(message(where,
                              options.budget.empty() && !plan
                                  ? "the memory that is free for experts is "
                              : plan ? "budget_bytes is "
                                     : "the expert budget is ",
                              bytes_text(layout.budget_bytes, Rounding::down), ", but the ", top_k,
                              " experts that one token uses in a layer ",
                              "have to be in memory together: the smallest budget that works is ",
                              share_text(layout.smallest_budget_bytes, total)));
  }
  if (plan) apply_plan(layout, sizes, *plan, options.plan);
  if (layout.is_pool) {
    share_out_pool(layout, sizes);
  } else if (!plan && layout.policy == "off") {
    for (const LayerSize& size : sizes) layout.layers.push_back(layer_layout(size, 0, 0));
  } else if (!plan) {
    share_out_slots(layout, sizes, options.split, layout.budget_bytes - layout.ring_bytes());
  }
  if (layout.policy == "off") layout.prefetch = PrefetchMode::off;
  return layout;
}

}  // namespace moerun
