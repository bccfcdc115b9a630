// A policy that knows what is coming, which only a simulation can have.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "expert/policy.h"

namespace moerun {

// Evicts the expert whose next use is farthest away: one that is never used again before all
// others, of these the higher index (L. A. Belady, 1966).
class BeladyPolicy final : public CachePolicy {
 public:
  // The experts of the tokens that will be decoded, one token after the other, each in the router's
  // order and with `top_k` of them.
  BeladyPolicy(std::size_t num_experts, std::size_t top_k, std::span<const std::size_t> future);
  std::size_t victim(std::span<const std::size_t> candidates) const override;

 private:
  // The place in `future` of the next use after the current token.
  std::size_t next_use(std::size_t expert) const;

  std::size_t top_k_;
  std::vector<std::vector<std::size_t>> uses_;  // of each expert, rising
};

}  // namespace moerun
