// What the tokens of a window got from the cache, and what they could have got.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "expert/routing_window.h"

namespace moerun {

// A hit: the expert was in a slot, all of it or its top.
struct WindowLayerHits {
  std::uint64_t lookups = 0;
  std::uint64_t live = 0;
  std::uint64_t best_static = 0;  // of the best set of experts that fits, chosen afterwards
  // The most that any choice of what to keep gives, from the same first content and with the same
  // experts put there by prompts; never below `live`.
  std::uint64_t optimal = 0;

  WindowLayerHits& operator+=(const WindowLayerHits& other) {
    lookups += other.lookups;
    live += other.live;
    best_static += other.best_static;
    optimal += other.optimal;
    return *this;
  }
};

struct WindowHits {
  std::size_t num_tokens = 0;
  std::vector<WindowLayerHits> layers;  // as RoutingHistory::layers
};

// `num_slots`: of each layer, all the while.
WindowHits window_hits(const RoutingHistory& history, std::span<const std::size_t> num_slots);

}  // namespace moerun
