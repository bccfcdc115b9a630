// Local load balance: how evenly the experts of a layer share the tokens of a window.
#pragma once

#include <cstddef>

#include "metrics/routing_view.h"

namespace moerun {

// Sum over all overlapping windows of `segment_length` tokens of the standard deviation (over
// experts) of f / segment_length, f being an expert's activations in the window; 0 where the
// sequence has no such window.
double sum_of_deviations(const RoutingView& routing, std::size_t segment_length);

}  // namespace moerun
