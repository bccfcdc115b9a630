#include "metrics/window_balance.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/error.h"

namespace moerun {

double sum_of_deviations(const RoutingView& routing, std::size_t segment_length) {
  if (segment_length == 0) throw InvalidArgument("segment_length: expected at least 1, found 0");
  const std::size_t tokens = routing.num_tokens();
  if (tokens < segment_length) return 0;
  std::vector<std::int64_t> counts(routing.num_experts, 0);
  std::int64_t squares = 0;  // sum of counts squared, kept up to date
  const auto experts = static_cast<double>(routing.num_experts);
  const auto length = static_cast<double>(segment_length);
  // Every window has the same number of activations, so only the squares change.
  const double mean = static_cast<double>(routing.slots) / experts;
  double sum = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    if (t >= segment_length) {
      for (const std::size_t expert : routing.token(t - segment_length)) {
        squares -= 2 * counts[expert]-- - 1;
      }
    }
    for (const std::size_t expert : routing.token(t)) squares += 2 * counts[expert]++ + 1;
    if (t + 1 < segment_length) continue;
    const double mean_square = static_cast<double>(squares) / (experts * length * length);
    sum += std::sqrt(std::max(0.0, mean_square - mean * mean));
  }
  return sum;
}

}  // namespace moerun
