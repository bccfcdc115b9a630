#include "metrics/srp.h"

#include <algorithm>

#include "base/error.h"

namespace moerun {

ActivationCounts::ActivationCounts(std::size_t num_experts, std::size_t segment_length)
    : num_experts_(num_experts), segment_length_(segment_length) {
  if (num_experts == 0 || segment_length == 0) {
    throw InvalidArgument(message("expected at least 1 expert and segments of at least 1 token, ",
                                  "found ", num_experts, " and ", segment_length));
  }
  counts_.assign(num_experts * (segment_length + 1), 0);
}

void ActivationCounts::add(const RoutingView& routing) {
  if (routing.num_experts != num_experts_) {
    throw InvalidArgument(
        message("routing: expected ", num_experts_, " experts, found ", routing.num_experts));
  }
  check_routing(routing);
  const std::size_t tokens = routing.num_tokens();
  if (tokens < segment_length_) return;
  // An expert's count changes only where it enters or leaves the window: so each change writes down
  // for how many windows the count before it held.
  struct State {
    std::size_t count = 0;
    std::size_t since = 0;  // the window that has had this count first
  };
  std::vector<State> states(num_experts_);
  const auto change = [&](std::size_t expert, std::size_t window, bool enters) {
    State& state = states[expert];
    counts_[expert * (segment_length_ + 1) + state.count] += window - state.since;
    state = {enters ? state.count + 1 : state.count - 1, window};
  };
  for (std::size_t t = 0; t < tokens; ++t) {
    // Windows are numbered by their first token; before the first is whole, it is window 0.
    const std::size_t window = t + 1 < segment_length_ ? 0 : t + 1 - segment_length_;
    if (t >= segment_length_) {
      for (const std::size_t expert : routing.token(t - segment_length_)) {
        change(expert, window, false);
      }
    }
    for (const std::size_t expert : routing.token(t)) change(expert, window, true);
  }
  const std::size_t windows = tokens - segment_length_ + 1;
  for (std::size_t expert = 0; expert < num_experts_; ++expert) {
    counts_[expert * (segment_length_ + 1) + states[expert].count] +=
        windows - states[expert].since;
  }
}

void ActivationCounts::add(const ActivationCounts& other) {
  if (other.num_experts_ != num_experts_ || other.segment_length_ != segment_length_) {
    throw InvalidArgument("activation counts of different sizes cannot be added");
  }
  std::transform(counts_.begin(), counts_.end(), other.counts_.begin(), counts_.begin(),
                 [](std::uint64_t a, std::uint64_t b) { return a + b; });
}

Srp srp_of(std::span<const std::uint64_t> histogram) {
  const std::size_t m = histogram.size() - 1;
  std::uint64_t activations = 0;
  std::uint64_t windows = 0;
  for (std::size_t f = 0; f <= m; ++f) {
    activations += f * histogram[f];
    windows += histogram[f];
  }
  if (activations == 0) return {};
  // F1(a) = 2 * sum over f >= a of f / (m * [windows with f >= a] + sum of f), from the highest
  // threshold down; equal values go to the lower one.
  Srp best;
  std::uint64_t covered = 0;
  std::uint64_t chosen = 0;
  for (std::size_t a = m + 1; a-- > 0;) {
    covered += a * histogram[a];
    chosen += histogram[a];
    const double f1 =
        2.0 * static_cast<double>(covered) / static_cast<double>(m * chosen + activations);
    if (f1 < best.srp) continue;
    best.srp = f1;
    best.threshold = a;
    best.cache_ratio = static_cast<double>(m * chosen) / static_cast<double>(activations);
  }
  best.activation_rate = static_cast<double>(activations) / static_cast<double>(m * windows);
  return best;
}

}  // namespace moerun
