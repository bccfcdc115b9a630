// Segment routing best performance: how well one fixed set of experts serves a window of tokens
// (arXiv 2505.16056, "Not All Models Suit Expert Offloading").
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "metrics/routing_view.h"

namespace moerun {

// For every expert, how many of the overlapping windows of `segment_length` tokens activate it f
// times, f = 0 ... segment_length. Sums over sequences are sums of these.
class ActivationCounts {
 public:
  // Throws InvalidArgument unless both are at least 1.
  ActivationCounts(std::size_t num_experts, std::size_t segment_length);

  // A sequence shorter than a window has none, and adds nothing. Throws as check_routing.
  void add(const RoutingView& routing);
  void add(const ActivationCounts& other);  // of the same sizes

  std::size_t num_experts() const { return num_experts_; }
  std::size_t segment_length() const { return segment_length_; }
  // (segment_length + 1) numbers of windows.
  std::span<const std::uint64_t> of_expert(std::size_t expert) const {
    return {counts_.data() + expert * (segment_length_ + 1), segment_length_ + 1};
  }

 private:
  std::size_t num_experts_;
  std::size_t segment_length_;
  std::vector<std::uint64_t> counts_;  // (num_experts, segment_length + 1)
};

struct Srp {
  double srp = 0;              // the largest F1 over thresholds
  std::size_t threshold = 0;   // the smallest that reaches it: an expert with so many activations
                               // in a window belongs to the set
  double cache_ratio = 0;      // size of the set by the number of active experts
  double activation_rate = 0;  // of all (expert, token) pairs
};

// Of a group of experts (one, a layer, a model): `histogram` is the sum of theirs. All zero where
// the group was never activated.
Srp srp_of(std::span<const std::uint64_t> histogram);

}  // namespace moerun
