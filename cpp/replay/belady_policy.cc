#include "replay/belady_policy.h"

#include <algorithm>
#include <limits>

namespace moerun {

BeladyPolicy::BeladyPolicy(std::size_t num_experts, std::size_t top_k,
                           std::span<const std::size_t> future)
    : CachePolicy(num_experts), top_k_(top_k), uses_(num_experts) {
  for (std::size_t place = 0; place < future.size(); ++place) {
    uses_[future[place]].push_back(place);
  }
}

std::size_t BeladyPolicy::next_use(std::size_t expert) const {
  const auto& uses = uses_[expert];
  // token() counts from 1: this is where the tokens after the current one begin.
  const auto next = std::lower_bound(uses.begin(), uses.end(), token() * top_k_);
  return next == uses.end() ? std::numeric_limits<std::size_t>::max() : *next;
}

std::size_t BeladyPolicy::victim(std::span<const std::size_t> candidates) const {
  return *std::max_element(candidates.begin(), candidates.end(), [&](std::size_t a, std::size_t b) {
    const std::size_t use_of_a = next_use(a);
    const std::size_t use_of_b = next_use(b);
    return use_of_a != use_of_b ? use_of_a < use_of_b : a < b;
  });
}

}  // namespace moerun
