// What a simulation refuses.
#pragma once

#include <cstddef>
#include <span>

#include "replay/simulator.h"

namespace moerun {

// All throw InvalidArgument.
void check_sim_costs(const SimCosts& costs, std::size_t num_layers);
void check_sim_sequences(std::span<const SimSequence> sequences, const ModelWeights& weights,
                         std::size_t top_k);
void check_sim_options(const SimOptions& options, std::span<const SimSequence> sequences);

}  // namespace moerun
