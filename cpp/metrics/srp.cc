#include "metrics/srp.h"

#include <vector>

#include "base/error.h"

namespace moerun {

void count_activations(const RoutingView& routing, std::size_t segment_length, CountBy by,
                       std::span<std::uint64_t> counts) {
  const std::size_t num_rows = by == CountBy::expert ? routing.num_experts : 1;
  if (segment_length == 0 || counts.size() != num_rows * (segment_length + 1)) {
    throw InvalidArgument(message("expected segments of at least 1 token and room for ", num_rows,
                                  " x (segment_length + 1) counts, found ", segment_length, " and ",
                                  counts.size()));
  }
  const std::size_t row = by == CountBy::expert ? segment_length + 1 : 0;
  const std::size_t tokens = routing.num_tokens();
  if (tokens < segment_length) return;
  // An expert's count changes only where it enters or leaves the window: so each change writes down
  // for how many windows the count before it held.
  struct State {
    std::size_t count = 0;
    std::size_t since = 0;  // the window that has had this count first
  };
  std::vector<State> states(routing.num_experts);
  const auto change = [&](std::size_t expert, std::size_t window, bool enters) {
    State& state = states[expert];
    counts[expert * row + state.count] += window - state.since;
    state = {enters ? state.count + 1 : state.count - 1, window};
  };
  for (std::size_t t = 0; t < tokens; ++t) {
    // Windows are numbered by their first token; before the first is whole, it is window 0.
    const std::size_t window = t + 1 < segment_length ? 0 : t + 1 - segment_length;
    if (t >= segment_length) {
      for (const std::size_t expert : routing.token(t - segment_length)) {
        change(expert, window, false);
      }
    }
    for (const std::size_t expert : routing.token(t)) change(expert, window, true);
  }
  const std::size_t windows = tokens - segment_length + 1;
  for (std::size_t expert = 0; expert < routing.num_experts; ++expert) {
    counts[expert * row + states[expert].count] += windows - states[expert].since;
  }
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
