#include "plan/cost_model.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace moerun {
namespace {

// Experts named in advance that arrive within `window`: the m at which the fetches of the first m
// add up to it, a part of one counting as a part.
double ready_in(double window, double fetch_s, double most) {
  if (fetch_s <= 0) return most;
  return std::min(most, window / fetch_s);
}

// Sum of the first m entries, m need not be whole.
double sum_of_first(std::span<const double> values, double m) {
  double sum = 0;
  for (const double value : values) {
    if (m <= 0) break;
    sum += value * std::min(1.0, m);
    m -= 1;
  }
  return sum;
}

}  // namespace

TransferCost fit_transfer(std::span<const TransferSample> samples) {
  double smallest = INFINITY;  // mean piece of a sample
  double largest = 0;
  for (const TransferSample& sample : samples) {
    for (const double number : {sample.bytes, sample.seconds, sample.pieces}) {
      if (number > 0 && std::isfinite(number)) continue;
      throw InvalidArgument(message("transfers: expected bytes, seconds and pieces above 0, found ",
                                    sample.bytes, " bytes in ", sample.seconds, " s and ",
                                    sample.pieces, " pieces"));
    }
    smallest = std::min(smallest, sample.bytes / sample.pieces);
    largest = std::max(largest, sample.bytes / sample.pieces);
  }
  if (!(largest > smallest * (1 + 1e-9))) {
    throw InvalidArgument("transfers: expected pieces of at least two sizes; measure another one");
  }
  // Least squares of (f p + g b - s) / s over f and g, with b in units of the largest piece.
  double pp = 0;
  double pb = 0;
  double bb = 0;
  double p1 = 0;
  double b1 = 0;
  for (const TransferSample& sample : samples) {
    const double p = sample.pieces / sample.seconds;
    const double b = sample.bytes / largest / sample.seconds;
    pp += p * p;
    pb += p * b;
    bb += b * b;
    p1 += p;
    b1 += b;
  }
  const double determinant = pp * bb - pb * pb;
  double fixed = (p1 * bb - b1 * pb) / determinant;
  double slope = (pp * b1 - pb * p1) / determinant;
  if (fixed < 0) {
    fixed = 0;
    slope = b1 / bb;
  }
  if (!(slope > 0) || !std::isfinite(slope)) {
    throw InvalidArgument(
        "transfers: more bytes take no longer in these samples; measure larger sizes");
  }
  return {fixed, largest / slope};
}

void set_windows(std::span<LayerModel> layers, double head_s) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerModel& before = layers[l == 0 ? layers.size() - 1 : l - 1];
    layers[l].window_s = before.moe_s + layers[l].attention_s + (l == 0 ? head_s : 0);
  }
}

LayerEstimate estimate_layer(const LayerModel& layer, const TransferCost& link,
                             const CacheSetting& setting) {
  const double split =
      layer.records == 0 || setting.num_slots == 0
          ? 0
          : static_cast<double>(setting.top_records) / static_cast<double>(layer.records);
  const auto k = static_cast<double>(layer.top_k);
  const double whole = layer.expert_bytes();
  LayerEstimate result;
  result.hit_rate = split > 0 ? layer.hit_rate[setting.num_slots] : 0;
  const double hit = result.hit_rate;
  // An expert that is wanted: with probability `hit` its top is there.
  const double fetch_s = hit * link.seconds((1 - split) * whole) + (1 - hit) * link.seconds(whole);
  const double fetch_bytes = (1 - hit * split) * whole;

  result.num_ready =
      ready_in(layer.window_s, fetch_s, static_cast<double>(layer.correctness.size()));
  result.num_useful = std::min(k, sum_of_first(layer.correctness, result.num_ready));
  result.prefetch_bytes = result.num_ready * fetch_bytes;

  const double wanted = k - result.num_useful;
  result.missing = wanted * (1 - hit * split);
  result.demand_bytes = wanted * fetch_bytes;
  // Two machines in a row, link and processor: what is there is computed first, the rest as it
  // lands. The processor is idle before the first arrival, or waits for the last one.
  const double each_s = k > 0 ? layer.moe_s / k : 0;
  const double arrivals_s = wanted * fetch_s;
  const double of_one = std::min(1.0, result.missing);
  const double first = of_one * link.seconds(whole) + result.missing * each_s;
  const double last = arrivals_s + of_one * each_s;
  const double waits = std::min(1.0, wanted * (split < 1 ? 1 : 1 - hit));  // for so many segments
  result.exposed_s = std::max(0.0, std::max(first, last) - layer.moe_s) + waits * layer.wake_s;
  return result;
}

double prompt_seconds(const LayerModel& layer, const TransferCost& link,
                      const CacheSetting& setting, std::size_t num_tokens, std::size_t chunk) {
  const auto experts = static_cast<double>(layer.num_experts);
  const double resident = static_cast<double>(std::min(setting.num_slots, layer.num_experts)) *
                          static_cast<double>(setting.top_records * layer.record_bytes) / experts;
  double seconds = 0;
  for (std::size_t first = 0; first < num_tokens; first += chunk) {
    const auto tokens = static_cast<double>(std::min(chunk, num_tokens - first));
    const double used = std::min(experts, tokens * static_cast<double>(layer.top_k));
    const double moving = used * link.seconds(layer.expert_bytes() - resident);
    seconds += std::max(moving, tokens * layer.prompt_s);
  }
  return seconds;
}

}  // namespace moerun
