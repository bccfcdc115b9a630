#include "expert/next_use.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

constexpr double kFading = 1.0 / 16;  // of a step; anything from 1/50 to 1/5 does as well
// Of an expert that nothing is known of; and of one that is never used, so that it has an order.
constexpr double kFirst = 0.5;
constexpr double kLeast = 1e-3;
// Right for four of five experts that a router names one layer ahead.
constexpr float kNamed = 0.8F;

}  // namespace

NextUse::NextUse(std::size_t num_layers, std::size_t num_experts)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      has_run_(num_layers, false),
      frequency_(num_layers * num_experts, kFirst) {}

void NextUse::begin_step() {
  begin_ += static_cast<double>(num_layers_);
  has_run_.assign(num_layers_, false);
  now_ = std::exchange(next_, {});
}

void NextUse::expect(PathForecast forecast) {
  for (const auto* chances : {&forecast.now, &forecast.next}) {
    if (chances->empty() || chances->size() == frequency_.size()) continue;
    throw InvalidArgument(message("expected a chance for each of ", num_layers_, " x ",
                                  num_experts_, " experts, found ", chances->size()));
  }
  now_ = std::move(forecast.now);
  next_ = std::move(forecast.next);
}

void NextUse::expect(std::size_t layer, std::span<const std::size_t> experts) {
  std::vector<float>& known = has_run_[layer] ? next_ : now_;
  if (known.empty()) known.assign(frequency_.begin(), frequency_.end());
  for (const std::size_t expert : experts) {
    float& chance = known[layer * num_experts_ + expert];
    chance = std::max(chance, kNamed);
  }
}

void NextUse::run(std::size_t layer, std::span<const std::size_t> experts) {
  has_run_[layer] = true;
  const auto first = frequency_.begin() + static_cast<std::ptrdiff_t>(layer * num_experts_);
  std::for_each_n(first, num_experts_, [](double& share) { share *= 1 - kFading; });
  for (const std::size_t expert : experts) first[static_cast<std::ptrdiff_t>(expert)] += kFading;
}

double NextUse::chance(std::size_t layer, std::size_t expert) const {
  const std::size_t index = layer * num_experts_ + expert;
  const std::vector<float>& known = has_run_[layer] ? next_ : now_;
  return known.empty() ? frequency_[index] : static_cast<double>(known[index]);
}

double NextUse::moment(std::size_t layer, std::size_t expert) const {
  const auto layers = static_cast<double>(num_layers_);
  const double turn = begin_ + static_cast<double>(layer) + (has_run_[layer] ? layers : 0);
  const double share = std::max(kLeast, frequency_[layer * num_experts_ + expert]);
  return turn + (1 - chance(layer, expert)) * layers / share;
}

double NextUse::moment_after(std::size_t layer, std::size_t expert) const {
  const auto layers = static_cast<double>(num_layers_);
  const std::size_t index = layer * num_experts_ + expert;
  const double share = std::max(kLeast, frequency_[index]);
  const bool is_known = !has_run_[layer] && !next_.empty();
  const double chance = is_known ? static_cast<double>(next_[index]) : frequency_[index];
  const double turn = begin_ + static_cast<double>(layer) + (has_run_[layer] ? 2 : 1) * layers;
  return turn + (1 - chance) * layers / share;
}

}  // namespace moerun
