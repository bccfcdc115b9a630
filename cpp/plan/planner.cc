#include "plan/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

// Units in which a budget is divided. The work grows with the square of their number: this many
// take some hundredths of a second, and more find hardly better plans.
constexpr std::size_t kMaxUnits = 1024;
// Of plans that take equally long, the one that moves less: what moves costs a millionth of its
// time even where computing hides it.
constexpr double kHiddenWeight = 1e-6;

std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

// As the cache rounds a split: to whole quanta, at least one.
std::size_t top_records_of(double split, const LayerModel& layer) {
  if (split <= 0) return 0;
  if (split >= 1) return layer.records;
  const auto quantum = static_cast<double>(layer.quantum_records);
  const double quanta = std::round(split * static_cast<double>(layer.records) / quantum);
  return std::min(layer.records, std::max<std::size_t>(1, static_cast<std::size_t>(quanta)) *
                                     layer.quantum_records);
}

void check_seconds(std::size_t layer, const char* name, double seconds) {
  if (is_cost(seconds)) return;
  throw InvalidArgument(message("layer ", layer, ": ", name, ": expected seconds, at least 0 and ",
                                "at most ", kMaxCostSeconds, ", found ", seconds));
}

// Of a few seconds that were checked.
void check_sum(std::size_t layer, const char* name, double seconds) {
  if (seconds >= 0 && std::isfinite(seconds)) return;
  throw InvalidArgument(
      message("layer ", layer, ": ", name, ": expected seconds, at least 0, found ", seconds));
}

void check_probability(std::size_t layer, const char* name, std::size_t index, double value) {
  if (value >= 0 && value <= 1) return;
  throw InvalidArgument(
      message("layer ", layer, ": ", name, "[", index, "]: expected 0 to 1, found ", value));
}

void check_table(std::size_t layer, const char* name, const std::vector<double>& table,
                 std::size_t rows, std::size_t columns) {
  if (!table.empty() && table.size() != rows * columns) {
    throw InvalidArgument(message("layer ", layer, ": ", name, ": expected ", rows, " rows of ",
                                  columns, " numbers, found ", table.size()));
  }
  for (std::size_t i = 0; i < table.size(); ++i) check_probability(layer, name, i, table[i]);
}

void check_tables(std::size_t index, const LayerModel& layer) {
  const std::size_t columns = layer.hit_rate.size();
  const std::size_t guesses = layer.correctness.size();
  check_table(index, "missing", layer.missing, layer.top_k + 1, columns);
  check_table(index, "absent", layer.absent, guesses, columns);
  check_table(index, "absent_right", layer.absent_right, guesses, columns);
  for (std::size_t n = 0; n < columns && !layer.missing.empty(); ++n) {
    double sum = 0;
    for (std::size_t x = 0; x <= layer.top_k; ++x) sum += layer.missing[x * columns + n];
    if (std::abs(sum - 1) > 1e-6) {
      throw InvalidArgument(message("layer ", index, ": missing: with ", n,
                                    " slots expected shares that add up to 1, found ", sum));
    }
  }
}

void check(std::size_t index, const LayerModel& layer) {
  if (layer.num_experts == 0 || layer.top_k == 0 || layer.top_k > layer.num_experts ||
      layer.records == 0 || layer.record_bytes == 0 || layer.quantum_records == 0) {
    throw InvalidArgument(message(
        "layer ", index, ": expected 1 <= top_k <= num_experts and sizes of at least 1, found ",
        "top_k ", layer.top_k, ", num_experts ", layer.num_experts, ", ", layer.records,
        " records of ", layer.record_bytes, " bytes"));
  }
  constexpr double kMaxBytes = 1e15;
  if (static_cast<double>(layer.num_experts) * layer.expert_bytes() > kMaxBytes) {
    throw InvalidArgument(message("layer ", index, ": expected at most ", kMaxBytes,
                                  " bytes of experts, found ", layer.num_experts, " of ",
                                  layer.expert_bytes()));
  }
  const std::size_t num_moves = divide_up(layer.records, layer.quantum_records) + 1;
  const bool are_sizes = std::all_of(layer.moves.begin(), layer.moves.end(), [](const auto& move) {
    return move.pieces >= 0 && std::isfinite(move.pieces) && move.bytes >= 0 && move.bytes <= 1e15;
  });
  if (!layer.moves.empty() && (layer.moves.size() != num_moves || !are_sizes)) {
    throw InvalidArgument(message("layer ", index, ": moves: expected ", num_moves,
                                  " sizes of at least 0 pieces and bytes, found ",
                                  layer.moves.size(), are_sizes ? "" : ", some of which are not"));
  }
  check_seconds(index, "attention", layer.attention_s);
  check_seconds(index, "moe", layer.moe_s);
  check_seconds(index, "prompt", layer.prompt_s);
  check_sum(index, "window", layer.window_s);
  check_sum(index, "before", layer.before_s);
  if (layer.hit_rate.size() != layer.num_experts + 1) {
    throw InvalidArgument(message("layer ", index, ": hit_rate: expected ", layer.num_experts + 1,
                                  " numbers, for 0 to ", layer.num_experts, " slots, found ",
                                  layer.hit_rate.size()));
  }
  for (std::size_t n = 0; n < layer.hit_rate.size(); ++n) {
    check_probability(index, "hit_rate", n, layer.hit_rate[n]);
    if (n > 0 && layer.hit_rate[n] < layer.hit_rate[n - 1]) {
      throw InvalidArgument(message("layer ", index, ": hit_rate: falls from ",
                                    layer.hit_rate[n - 1], " to ", layer.hit_rate[n], " at ", n,
                                    " slots; more slots cannot hit less"));
    }
  }
  check_tables(index, layer);
  if (layer.correctness.size() > layer.num_experts) {
    throw InvalidArgument(message("layer ", index, ": correctness: expected at most ",
                                  layer.num_experts, " numbers, found ", layer.correctness.size()));
  }
  for (std::size_t r = 0; r < layer.correctness.size(); ++r) {
    check_probability(index, "correctness", r, layer.correctness[r]);
  }
}

}  // namespace

Planner::Planner(PlanProblem problem, double fixed_split)
    : problem_(std::move(problem)), fixed_split_(fixed_split) {
  if (problem_.layers.empty()) throw InvalidArgument("layers: expected at least one, found none");
  if (fixed_split > 1 || std::isnan(fixed_split)) {
    throw InvalidArgument(message("split: expected 0 to 1, found ", fixed_split));
  }
  check_seconds(0, "head", problem_.head_s);
  if (!is_rate(problem_.link.bytes_per_s) || !is_cost(problem_.link.fixed_s)) {
    throw InvalidArgument(message("link: expected a rate of ", kMinBytesPerS, " to ", kMaxBytesPerS,
                                  " and a fixed time of at least 0 and at most ", kMaxCostSeconds,
                                  " s, found ", problem_.link.bytes_per_s, " bytes a second and ",
                                  problem_.link.fixed_s, " s"));
  }
  if (problem_.link.channels == 0) {
    throw InvalidArgument("link: expected at least 1 channel, found 0");
  }
  check_seconds(0, "wake", problem_.link.wake_s);
  if (!is_cost(problem_.link.slowdown)) {
    throw InvalidArgument(message("slowdown: expected at least 0 and at most ", kMaxCostSeconds,
                                  ", found ", problem_.link.slowdown));
  }
  for (std::size_t l = 0; l < problem_.layers.size(); ++l) {
    check(l, problem_.layers[l]);
    options_.push_back(options_of(problem_.layers[l], fixed_split));
  }
}

double Planner::cost(const LayerModel& layer, const CacheSetting& setting) const {
  const LayerEstimate found = estimate_layer(layer, problem_.link, setting);
  return found.exposed_s +
         kHiddenWeight * (found.demand_bytes + found.prefetch_bytes) / problem_.link.bytes_per_s;
}

std::vector<Planner::Option> Planner::options_of(const LayerModel& layer,
                                                 double fixed_split) const {
  std::vector<Option> all = {{0, cost(layer, {}), {}}};
  const auto add = [&](std::size_t top) {
    for (std::size_t slots = 1; slots <= layer.num_experts; ++slots) {
      const CacheSetting setting{slots, top};
      all.push_back({slots * top * layer.record_bytes, cost(layer, setting), setting});
    }
  };
  if (fixed_split >= 0) {
    const std::size_t top = top_records_of(fixed_split, layer);
    if (top > 0) add(top);
  } else {
    for (std::size_t top = 0; top < layer.records;) {
      top = std::min(layer.records, top + layer.quantum_records);
      add(top);
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Option& a, const Option& b) {
    return a.bytes < b.bytes || (a.bytes == b.bytes && a.cost < b.cost);
  });
  std::vector<Option> useful;
  for (const Option& option : all) {
    if (useful.empty() || option.cost < useful.back().cost) useful.push_back(option);
  }
  return useful;
}

const Planner::Option& Planner::best_within(std::size_t layer, std::size_t bytes) const {
  const auto& options = options_[layer];
  const auto after = std::upper_bound(
      options.begin(), options.end(), bytes,
      [](std::size_t limit, const Option& option) { return limit < option.bytes; });
  return *std::prev(after);
}

CacheSetting Planner::best_of_layer(std::size_t layer, std::size_t bytes) const {
  return best_within(layer, bytes).setting;
}

std::vector<const Planner::Option*> Planner::divide_in_units(std::size_t bytes) const {
  std::size_t expert = 0;
  std::size_t quanta = 1;
  for (const LayerModel& layer : problem_.layers) {
    expert = std::max(expert, layer.records * layer.record_bytes);
    quanta = std::max(quanta, divide_up(layer.records, layer.quantum_records));
  }
  // A whole expert is a whole number of units where the budget allows it, at best a unit a quantum.
  const std::size_t per_expert =
      std::min<std::size_t>(quanta, bytes == 0 ? 1 : kMaxUnits * expert / bytes);
  const std::size_t unit =
      std::max<std::size_t>(1, per_expert > 0 ? expert / per_expert : divide_up(bytes, kMaxUnits));
  const std::size_t num_units = bytes / unit;

  // best[u]: least cost of the layers so far within u units (a multiple-choice knapsack).
  const std::size_t num_layers = problem_.layers.size();
  std::vector<double> best(num_units + 1, 0);
  std::vector<double> next(num_units + 1);
  std::vector<std::uint32_t> taken(num_layers * (num_units + 1));  // which option
  for (std::size_t l = 0; l < num_layers; ++l) {
    std::fill(next.begin(), next.end(), std::numeric_limits<double>::infinity());
    std::uint32_t* choice = taken.data() + l * (num_units + 1);
    const auto& options = options_[l];
    for (std::size_t i = 0; i < options.size(); ++i) {
      const std::size_t weight = divide_up(options[i].bytes, unit);
      if (weight > num_units) break;
      const bool is_last = i + 1 == options.size();
      if (!is_last && divide_up(options[i + 1].bytes, unit) == weight) continue;  // that is better
      const double cost = options[i].cost;
      for (std::size_t u = weight; u <= num_units; ++u) {
        const double candidate = best[u - weight] + cost;
        if (candidate < next[u]) {
          next[u] = candidate;
          choice[u] = static_cast<std::uint32_t>(i);
        }
      }
    }
    std::swap(best, next);
  }
  std::vector<const Option*> chosen(num_layers);
  std::size_t left = num_units;
  for (std::size_t l = num_layers; l-- > 0;) {
    chosen[l] = &options_[l][taken[l * (num_units + 1) + left]];
    left -= divide_up(chosen[l]->bytes, unit);
  }
  return chosen;
}

void Planner::spend_the_rest(std::vector<const Option*>& chosen, std::size_t bytes) const {
  std::size_t used = 0;
  for (const Option* option : chosen) used += option->bytes;
  while (true) {
    std::size_t best_layer = 0;
    const Option* best = nullptr;
    double best_gain = 0;
    for (std::size_t l = 0; l < chosen.size(); ++l) {
      const Option& option = best_within(l, chosen[l]->bytes + bytes - used);
      const double gain = chosen[l]->cost - option.cost;
      if (gain > best_gain) {
        best_gain = gain;
        best_layer = l;
        best = &option;
      }
    }
    if (best == nullptr) return;
    used += best->bytes - chosen[best_layer]->bytes;
    chosen[best_layer] = best;
  }
}

std::vector<CacheSetting> Planner::divide(std::size_t bytes) const {
  bytes = std::min(bytes, total_bytes());
  auto chosen = divide_in_units(bytes);
  spend_the_rest(chosen, bytes);
  std::vector<CacheSetting> best;
  for (const Option* option : chosen) best.push_back(option->setting);
  double best_s = estimate(best).seconds;
  // Units are not bytes: where a uniform plan fits better, it wins.
  std::size_t quanta = 1;
  for (const LayerModel& layer : problem_.layers) {
    quanta = std::max(quanta, divide_up(layer.records, layer.quantum_records));
  }
  for (std::size_t q = 1; q <= quanta; ++q) {
    const double split =
        fixed_split_ >= 0 ? fixed_split_ : static_cast<double>(q) / static_cast<double>(quanta);
    auto settings = uniform(bytes, split);
    const double seconds = estimate(settings).seconds;
    if (seconds < best_s) {
      best_s = seconds;
      best = std::move(settings);
    }
    if (fixed_split_ >= 0) break;
  }
  return best;
}

std::vector<CacheSetting> Planner::uniform(std::size_t bytes, double split) const {
  if (!(split >= 0 && split <= 1)) {
    throw InvalidArgument(message("split: expected 0 to 1, found ", split));
  }
  const std::size_t share = bytes / problem_.layers.size();
  std::vector<CacheSetting> settings;
  for (const LayerModel& layer : problem_.layers) {
    const std::size_t top = top_records_of(split, layer);
    const std::size_t slots =
        top == 0 ? 0 : std::min(layer.num_experts, share / (top * layer.record_bytes));
    settings.push_back({slots, slots == 0 ? 0 : top});
  }
  // What the divisions left over: one slot more for the first layers.
  for (std::size_t l = 0; l < settings.size(); ++l) {
    const LayerModel& layer = problem_.layers[l];
    const std::size_t top = top_records_of(split, layer);
    if (top != 0 && settings[l].num_slots < layer.num_experts &&
        bytes_of(settings) + top * layer.record_bytes <= bytes) {
      settings[l] = {settings[l].num_slots + 1, top};
    }
  }
  return settings;
}

TokenEstimate Planner::estimate(const std::vector<CacheSetting>& settings) const {
  const auto& layers = problem_.layers;
  if (settings.size() != layers.size()) {
    throw InvalidArgument(message("settings: expected one for each of ", layers.size(),
                                  " layers, found ", settings.size()));
  }
  TokenEstimate total;
  total.seconds = problem_.head_s;
  double lookups = 0;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerModel& layer = layers[l];
    if (settings[l].num_slots > layer.num_experts || settings[l].top_records > layer.records) {
      throw InvalidArgument(message("settings[", l, "]: expected at most ", layer.num_experts,
                                    " slots of ", layer.records, " records, found ",
                                    settings[l].num_slots, " of ", settings[l].top_records));
    }
    const LayerEstimate found = estimate_layer(layer, problem_.link, settings[l]);
    const auto k = static_cast<double>(layer.top_k);
    total.seconds += layer.attention_s + layer.moe_s + found.exposed_s;
    total.exposed_s += found.exposed_s;
    total.bytes += found.demand_bytes + found.prefetch_bytes;
    total.hit_rate += k * found.hit_rate;
    lookups += k;
    total.layers.push_back(found);
  }
  total.hit_rate /= lookups;
  return total;
}

double Planner::prompt_seconds(const std::vector<CacheSetting>& settings, std::size_t num_tokens,
                               std::size_t chunk) const {
  if (settings.size() != problem_.layers.size() || chunk == 0) {
    throw InvalidArgument(message("expected settings of ", problem_.layers.size(),
                                  " layers and a chunk of at least 1 token, found ",
                                  settings.size(), " and ", chunk));
  }
  double seconds = problem_.head_s;
  for (std::size_t l = 0; l < settings.size(); ++l) {
    seconds +=
        moerun::prompt_seconds(problem_.layers[l], problem_.link, settings[l], num_tokens, chunk);
  }
  return seconds;
}

std::size_t Planner::bytes_of(const std::vector<CacheSetting>& settings) const {
  if (settings.size() != problem_.layers.size()) {
    throw InvalidArgument(message("settings: expected one for each of ", problem_.layers.size(),
                                  " layers, found ", settings.size()));
  }
  std::size_t bytes = 0;
  for (std::size_t l = 0; l < settings.size(); ++l) {
    bytes += settings[l].num_slots * settings[l].top_records * problem_.layers[l].record_bytes;
  }
  return bytes;
}

std::size_t Planner::total_bytes() const {
  std::size_t bytes = 0;
  for (const LayerModel& layer : problem_.layers) {
    bytes += layer.num_experts * layer.records * layer.record_bytes;
  }
  return bytes;
}

}  // namespace moerun
