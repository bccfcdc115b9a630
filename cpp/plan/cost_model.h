// How long a token takes with a given cache: arithmetic on measured times. docs/planning.md derives
// the formulas and says what they leave out.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace moerun {

// Numbers beyond these are refused: times of a token would overflow.
inline constexpr double kMaxCostSeconds = 1e6;
inline constexpr double kMinBytesPerS = 1;
inline constexpr double kMaxBytesPerS = 1e18;
inline bool is_cost(double seconds) { return seconds >= 0 && seconds <= kMaxCostSeconds; }
inline bool is_rate(double bytes_per_s) {
  return bytes_per_s >= kMinBytesPerS && bytes_per_s <= kMaxBytesPerS;
}

// What has to move: so many pieces, of so many bytes in all.
struct TransferSize {
  double pieces = 0;
  double bytes = 0;
};

// The link from the slow tier: every piece takes fixed_s, and then its bytes their time. So many
// pieces are under way at once: their fixed times run beside each other, their bytes take turns.
struct TransferCost {
  double fixed_s = 0;
  double bytes_per_s = 1;
  std::size_t channels = 1;
  double slowdown = 0;  // computing takes so much of its time longer while the link is busy
  double wake_s = 0;    // a layer takes so much longer if it waits for what comes

  // Of pieces of one size, over an idle link.
  double seconds(const TransferSize& size) const;
  // That a queue takes longer with it.
  double in_queue(const TransferSize& size) const;
};

struct TransferSample {
  double bytes = 0;
  double seconds = 0;
  double pieces = 1;  // that it was moved in, each with the fixed time
};

// seconds = pieces * fixed_s + bytes / bytes_per_s with the least sum of squared relative errors,
// fixed_s not below 0. InvalidArgument unless there are pieces of two different sizes, all numbers
// are positive, and more bytes take longer.
TransferCost fit_transfer(std::span<const TransferSample> samples);

// A layer with experts: its sizes, its times, and what a trace says about it.
struct LayerModel {
  std::size_t num_experts = 0;
  std::size_t top_k = 0;
  std::size_t records = 0;  // of an expert
  std::size_t record_bytes = 0;
  std::size_t quantum_records = 1;
  double attention_s = 0;  // a token, from the end of the last expert block to this one's router
  double moe_s = 0;        // a token's experts, all resident
  double prompt_s = 0;     // attention and experts, for each token of a prompt
  // What moves of an expert whose first 0, 1, 2, ... quanta are there, up to all of it. Empty: the
  // bytes that are missing, in one piece.
  std::vector<TransferSize> moves;
  // Of a token, by number of slots, 0 ... num_experts; from 0 to 1, never falling.
  std::vector<double> hit_rate;
  // Tables of a number for each of 0 ... num_experts slots, row after row.
  // Share of tokens of which x = 0 ... top_k experts have no slot. Empty: as if each were missing
  // by itself (binomial).
  std::vector<double> missing;
  // Probability that the r-th expert named in advance is used; empty: no prefetch.
  std::vector<double> correctness;
  // That it has no slot, and that it has none and is used. Empty: as if the two were independent.
  std::vector<double> absent;
  std::vector<double> absent_right;
  // Computing before the router for which the link has nothing on demand; and the experts of the
  // layer before, beside which their own come.
  double window_s = 0;
  double before_s = 0;

  double expert_bytes() const {
    return static_cast<double>(records) * static_cast<double>(record_bytes);
  }
  // What is missing of an expert whose first records are there.
  TransferSize move(std::size_t top_records) const;
};

// Slots of a layer and how much of an expert is in one.
struct CacheSetting {
  std::size_t num_slots = 0;
  std::size_t top_records = 0;

  bool operator==(const CacheSetting&) const = default;
};

// Sets window_s and before_s of all layers: the attention, and the experts of the layer before;
// before the first one come the head, and the last one of the token before.
void set_windows(std::span<LayerModel> layers, double head_s);

// One token in one layer, on average.
struct LayerEstimate {
  double hit_rate = 0;      // top segments that are there
  double num_ready = 0;     // experts fetched in advance and in time, right or wrong
  double num_useful = 0;    // of these, right ones
  double missing = 0;       // what has to come on demand, in whole experts
  double demand_bytes = 0;  // of it, as the slow tier gives them
  double prefetch_bytes = 0;
  double exposed_s = 0;  // waiting that no computing hides, and what computing is slowed down
};

LayerEstimate estimate_layer(const LayerModel& layer, const TransferCost& link,
                             const CacheSetting& setting);

// A prompt in one layer: in each chunk of at most `chunk` tokens what is not resident of the
// experts it can use moves once, beside the computing.
double prompt_seconds(const LayerModel& layer, const TransferCost& link,
                      const CacheSetting& setting, std::size_t num_tokens, std::size_t chunk);

}  // namespace moerun
