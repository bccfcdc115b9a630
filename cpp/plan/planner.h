// Divides a budget among layers: how many slots each has, and how much of an expert is in one.
#pragma once

#include <cstddef>
#include <vector>

#include "plan/cost_model.h"

namespace moerun {

struct PlanProblem {
  std::vector<LayerModel> layers;  // those with experts, windows set
  TransferCost link;
  double head_s = 0;  // a token, after the last layer
};

struct TokenEstimate {
  double seconds = 0;
  double exposed_s = 0;  // of it
  double hit_rate = 0;   // over all lookups
  double bytes = 0;      // moved on demand and in advance
  std::vector<LayerEstimate> layers;
};

class Planner {
 public:
  // InvalidArgument for a problem that contradicts itself. `fixed_split`: of all slots, rounded to
  // quanta as the cache does; below 0: each layer's own.
  explicit Planner(PlanProblem problem, double fixed_split = -1);

  const PlanProblem& problem() const { return problem_; }

  // The best for one layer within so many bytes (the inner problem).
  CacheSetting best_of_layer(std::size_t layer, std::size_t bytes) const;
  // The best found for all layers within so many bytes: an exact division of the budget in small
  // units, then what is left over; never slower than any uniform one.
  std::vector<CacheSetting> divide(std::size_t bytes) const;
  // As the cache does without a plan: the same bytes and the same split for every layer.
  std::vector<CacheSetting> uniform(std::size_t bytes, double split) const;

  TokenEstimate estimate(const std::vector<CacheSetting>& settings) const;
  double prompt_seconds(const std::vector<CacheSetting>& settings, std::size_t num_tokens,
                        std::size_t chunk) const;
  std::size_t bytes_of(const std::vector<CacheSetting>& settings) const;
  // What all experts take.
  std::size_t total_bytes() const;

 private:
  struct Option {
    std::size_t bytes;
    double cost;
    CacheSetting setting;
  };

  std::vector<Option> options_of(const LayerModel& layer, double fixed_split) const;
  double cost(const LayerModel& layer, const CacheSetting& setting) const;
  const Option& best_within(std::size_t layer, std::size_t bytes) const;
  std::vector<const Option*> divide_in_units(std::size_t bytes) const;
  void spend_the_rest(std::vector<const Option*>& chosen, std::size_t bytes) const;

  PlanProblem problem_;
  double fixed_split_;
  // Of each layer, in rising order of bytes, each better than all before it; the first is no slots.
  std::vector<std::vector<Option>> options_;
};

}  // namespace moerun
