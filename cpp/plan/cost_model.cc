#include "plan/cost_model.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace moerun {
namespace {

// A layer with one setting of its cache.
struct Cached {
  const LayerModel& layer;
  std::size_t slots = 0;
  double split = 0;
  TransferSize whole;   // what an expert takes of which nothing is there,
  TransferSize bottom;  // and one whose top is
  double whole_s = 0;   // in a queue of such
  double bottom_s = 0;

  double hit_rate() const { return split > 0 ? layer.hit_rate[slots] : 0; }
  double in_table(const std::vector<double>& table, std::size_t row) const {
    return table[row * layer.hit_rate.size() + slots];
  }
  // Of the r-th guess: that all of it has to be fetched; and that this is of use.
  double absent(std::size_t r) const {
    return layer.absent.empty() ? 1 - hit_rate() : in_table(layer.absent, r);
  }
  double absent_right(std::size_t r) const {
    return layer.absent_right.empty() ? layer.correctness[r] * (1 - hit_rate())
                                      : in_table(layer.absent_right, r);
  }
  // Chance that x experts of a token have no slot.
  std::vector<double> missing() const;
};

// Chances of 0 ... count successes.
std::vector<double> binomial(std::size_t count, double chance) {
  std::vector<double> result(count + 1, 0);
  if (chance >= 1) {
    result[count] = 1;
    return result;
  }
  result[0] = std::pow(1 - chance, static_cast<double>(count));
  for (std::size_t x = 1; x <= count; ++x) {
    result[x] = result[x - 1] * static_cast<double>(count - x + 1) / static_cast<double>(x) *
                chance / (1 - chance);
  }
  return result;
}

std::vector<double> Cached::missing() const {
  if (layer.missing.empty()) return binomial(layer.top_k, 1 - hit_rate());
  std::vector<double> result(layer.top_k + 1);
  for (std::size_t x = 0; x <= layer.top_k; ++x) result[x] = in_table(layer.missing, x);
  return result;
}

// What was fetched in advance for a token, on average.
struct Ahead {
  double num_ready = 0;
  double bytes = 0;
  double seconds = 0;  // of the link
  double whole = 0;    // experts of use that had no slot
  double bottoms = 0;  // bottoms of use
  double delay_s = 0;  // demand waits for a piece of a wrong one that is under way
};

// How much of a transfer is done within a time; all of it if there is nothing to transfer.
double part_done(double time_s, double transfer_s) {
  if (transfer_s <= 0) return 1;
  return std::clamp(time_s / transfer_s, 0.0, 1.0);
}

// Guesses in their order, as long as the window lasts; the last one in part. Each is absent by
// itself.
Ahead fetch_ahead(const Cached& cached, double window_s) {
  const std::vector<double>& right = cached.layer.correctness;
  Ahead result;
  std::vector<double> chance = {1};  // that j of the guesses before this one were absent
  double wrong = 0;
  const auto left_after = [&](std::size_t absent, std::size_t guesses) {
    return window_s - static_cast<double>(absent) * cached.whole_s -
           static_cast<double>(guesses - absent) * cached.bottom_s;
  };
  for (std::size_t r = 0; r < right.size(); ++r) {
    double whole = 0;
    double bottom = 0;
    for (std::size_t j = 0; j <= r; ++j) {
      const double left = left_after(j, r);
      whole += chance[j] * part_done(left, cached.whole_s);
      bottom += chance[j] * part_done(left, cached.bottom_s);
    }
    const double absent = cached.absent(r);
    const double useful = cached.absent_right(r);
    result.num_ready += absent * whole + (1 - absent) * bottom;
    result.seconds += absent * whole * cached.whole_s + (1 - absent) * bottom * cached.bottom_s;
    result.bytes +=
        absent * whole * cached.whole.bytes + (1 - absent) * bottom * cached.bottom.bytes;
    result.whole += whole * useful;
    result.bottoms += bottom * std::max(0.0, right[r] - useful);
    wrong += (1 - right[r]) / static_cast<double>(right.size());
    chance.push_back(0);
    for (std::size_t j = r + 1; j > 0; --j) {
      chance[j] = chance[j] * (1 - absent) + chance[j - 1] * absent;
    }
    chance[0] *= 1 - absent;
  }
  double unfinished = 0;
  for (std::size_t j = 0; j < chance.size() && !right.empty(); ++j) {
    if (left_after(j, right.size()) < 0) unfinished += chance[j];
  }
  // The piece under way began with the window, or at any time within it.
  const double piece_s = cached.whole_s / std::max(1.0, cached.whole.pieces);
  result.delay_s = unfinished * wrong * std::max(piece_s - window_s, piece_s / 2);
  return result;
}

// What comes on demand, and the waiting for it, on average.
struct Demand {
  double missing = 0;  // in whole experts
  double bytes = 0;
  double exposed_s = 0;
  double free_s = 0;  // of the time for the experts before and this waiting, the link is idle
};

Demand on_demand(const Cached& cached, const TransferCost& link, const std::vector<double>& missing,
                 const Ahead& ahead) {
  const LayerModel& layer = cached.layer;
  const auto k = static_cast<double>(layer.top_k);
  const double each_s = layer.moe_s / k;
  const double misses = k * (1 - cached.hit_rate());
  const double hits = k - misses;
  const double come = misses > 0 ? std::min(1.0, ahead.whole / misses) : 1;
  const double stay = hits > 0 ? 1 - std::min(1.0, ahead.bottoms / hits) : 0;
  const double bottoms_of_hit = cached.bottom_s > 0 ? stay : 0;
  Demand result;
  for (std::size_t before = 0; before <= layer.top_k; ++before) {
    if (missing[before] <= 0) continue;
    const std::vector<double> chance = binomial(before, 1 - come);
    const double bottoms = static_cast<double>(layer.top_k - before) * bottoms_of_hit;
    for (std::size_t x = 0; x <= before; ++x) {
      const double weight = missing[before] * chance[x];
      const auto wholes = static_cast<double>(x);
      const double count = wholes + bottoms;
      const double share = wholes + bottoms * (1 - cached.split);
      const TransferSize all = {wholes * cached.whole.pieces + bottoms * cached.bottom.pieces,
                                wholes * cached.whole.bytes + bottoms * cached.bottom.bytes};
      double link_s = link.seconds(all);
      double exposed_s = 0;
      if (count > 0) {
        const double one = std::min(1.0, count) / count;
        const double first_s = link.seconds({one * all.pieces, one * all.bytes}) + ahead.delay_s;
        link_s += ahead.delay_s;
        // Two machines in a row, link and processor: what is there is computed first, the rest as
        // it lands. The processor is idle before the first arrival, or waits for the last one.
        const double beside_s = std::min(share * each_s, link_s - first_s);
        const double first = first_s + share * each_s + link.slowdown * beside_s;
        const double last = link_s + one * share * each_s;
        const double busy_s = std::min(layer.moe_s, link_s / (1 + link.slowdown));
        const double computed = layer.moe_s + link.slowdown * busy_s;
        const double waited = std::max(first, last);
        exposed_s =
            std::max(computed, waited + (waited > computed ? link.wake_s : 0)) - layer.moe_s;
      }
      result.missing += weight * share;
      result.bytes += weight * all.bytes;
      result.exposed_s += weight * exposed_s;
      result.free_s += weight * std::max(0.0, layer.before_s + exposed_s - link_s);
    }
  }
  return result;
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
  if (!(slope > 0) || !std::isfinite(slope) || !is_cost(fixed) || !is_rate(largest / slope)) {
    throw InvalidArgument(
        "transfers: more bytes take no longer in these samples; measure larger sizes");
  }
  return {fixed, largest / slope};
}

double TransferCost::seconds(const TransferSize& size) const {
  if (size.pieces <= 0) return size.bytes / bytes_per_s;
  const double byte_s = size.bytes / size.pieces / bytes_per_s;  // of a piece
  const auto whole = [&](double pieces) {
    const auto at_once = static_cast<double>(channels);
    const double turns = std::ceil(pieces / at_once);
    const double in_turn = std::fmod(pieces - 1, at_once);  // whose bytes wait for those of others
    return std::max(fixed_s + pieces * byte_s, turns * (fixed_s + byte_s) + in_turn * byte_s);
  };
  if (size.pieces < 1) return size.pieces * whole(1);
  const double below = std::floor(size.pieces);
  const double part = size.pieces - below;
  return part > 0 ? (1 - part) * whole(below) + part * whole(below + 1) : whole(below);
}

double TransferCost::in_queue(const TransferSize& size) const {
  const double bytes_s = size.bytes / bytes_per_s;
  return std::max(bytes_s, (size.pieces * fixed_s + bytes_s) / static_cast<double>(channels));
}

TransferSize LayerModel::move(std::size_t top_records) const {
  if (top_records >= records) return {};
  if (moves.empty()) {
    return {1, static_cast<double>(records - top_records) * static_cast<double>(record_bytes)};
  }
  return moves[(top_records + quantum_records - 1) / quantum_records];
}

void set_windows(std::span<LayerModel> layers, double head_s) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const LayerModel& before = layers[l == 0 ? layers.size() - 1 : l - 1];
    layers[l].window_s = layers[l].attention_s + (l == 0 ? head_s : 0);
    layers[l].before_s = before.moe_s;
  }
}

LayerEstimate estimate_layer(const LayerModel& layer, const TransferCost& link,
                             const CacheSetting& setting) {
  Cached cached{.layer = layer, .whole = {}, .bottom = {}};
  if (setting.num_slots != 0 && setting.top_records != 0) {
    cached.slots = setting.num_slots;
    cached.split = static_cast<double>(setting.top_records) / static_cast<double>(layer.records);
  }
  cached.whole = layer.move(0);
  cached.bottom = layer.move(cached.split > 0 ? setting.top_records : 0);
  cached.whole_s = link.in_queue(cached.whole);
  cached.bottom_s = link.in_queue(cached.bottom);

  const std::vector<double> missing = cached.missing();
  Ahead ahead;
  Demand demand = on_demand(cached, link, missing, ahead);
  // The window is what demand of the layer before leaves of it, and that layer prefetches, too: it
  // is taken to be like this one. Twice is near enough to the fixed point.
  for (int round = 0; round < 2 && !layer.correctness.empty(); ++round) {
    ahead = fetch_ahead(cached, layer.window_s + demand.free_s);
    demand = on_demand(cached, link, missing, ahead);
  }
  // What is fetched in advance slows down what is computed meanwhile.
  demand.exposed_s += ahead.seconds * link.slowdown / (1 + link.slowdown);
  LayerEstimate result;
  result.hit_rate = cached.hit_rate();
  result.num_ready = ahead.num_ready;
  result.num_useful = ahead.whole + ahead.bottoms;
  result.prefetch_bytes = ahead.bytes;
  result.missing = demand.missing;
  result.demand_bytes = demand.bytes;
  result.exposed_s = demand.exposed_s;
  return result;
}

double prompt_seconds(const LayerModel& layer, const TransferCost& link,
                      const CacheSetting& setting, std::size_t num_tokens, std::size_t chunk) {
  const auto experts = static_cast<double>(layer.num_experts);
  const std::size_t slots =
      setting.top_records == 0 ? 0 : std::min(setting.num_slots, layer.num_experts);
  const double cached = static_cast<double>(slots) / experts;
  const double each_s = cached * link.in_queue(layer.move(setting.top_records)) +
                        (1 - cached) * link.in_queue(layer.move(0));
  double seconds = 0;
  for (std::size_t first = 0; first < num_tokens; first += chunk) {
    const auto tokens = static_cast<double>(std::min(chunk, num_tokens - first));
    const double used = std::min(experts, tokens * static_cast<double>(layer.top_k));
    const double moving = used * each_s;
    const double computing = tokens * layer.prompt_s;
    seconds += std::max(moving, computing + link.slowdown * std::min(moving, computing));
  }
  return seconds;
}

}  // namespace moerun
