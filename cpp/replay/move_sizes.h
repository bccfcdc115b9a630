// What the slow tier really moves of an expert that is partly there, for the planner.
#pragma once

#include <cstddef>
#include <vector>

#include "expert/expert_store.h"
#include "plan/cost_model.h"
#include "weights/model_weights.h"

namespace moerun {

// For each layer with experts, LayerModel::moves: the mean over its experts. Nothing is read.
std::vector<std::vector<TransferSize>> move_sizes(const ModelWeights& weights,
                                                  const PieceSizes& sizes);

}  // namespace moerun
