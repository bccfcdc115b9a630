#include "expert/expert_pool.h"

#include <algorithm>
#include <exception>
#include <utility>

namespace moerun {

ExpertPool::ExpertPool(std::size_t num_layers, std::size_t num_experts)
    : num_experts_(num_experts), held_(num_layers * num_experts) {}

const ExpertPool::Held* ExpertPool::find(Place place) const {
  const Held& held = held_[place.layer * num_experts_ + place.expert];
  return held.transfer ? &held : nullptr;
}

void ExpertPool::hold(Place place, Held held) {
  if (!held.is_there) on_the_way_.push_back(place);
  num_unused_ += held.is_used ? 0 : 1;
  at(place) = std::move(held);
}

ExpertPool::Held ExpertPool::take(Place place) {
  Held held = std::exchange(at(place), {});
  if (!held.transfer) return held;
  num_unused_ -= held.is_used ? 0 : 1;
  if (!held.is_there) {
    std::erase_if(on_the_way_, [&](const Place& each) {
      return each.layer == place.layer && each.expert == place.expert;
    });
  }
  return held;
}

std::vector<std::size_t> ExpertPool::used_experts(std::size_t layer) const {
  std::vector<std::size_t> experts;
  for (std::size_t expert = 0; expert < num_experts_; ++expert) {
    const Held* held = find({layer, expert});
    if (held != nullptr && held->is_used) experts.push_back(expert);
  }
  return experts;
}

std::vector<ExpertPool::Place> ExpertPool::unused() const {
  std::vector<Place> places;
  for (std::size_t i = 0; i < held_.size(); ++i) {
    if (held_[i].transfer && !held_[i].is_used) {
      places.push_back({i / num_experts_, i % num_experts_});
    }
  }
  return places;
}

std::vector<ExpertPool::Place> ExpertPool::look(TransferEngine& engine) {
  std::vector<Place> failed;
  std::erase_if(on_the_way_, [&](const Place& place) {
    Held& held = at(place);
    try {
      held.is_there = engine.is_complete(*held.transfer);
    } catch (const std::exception&) {
      failed.push_back(place);
    }
    return held.is_there;
  });
  return failed;
}

std::optional<ExpertPool::Place> ExpertPool::last_needed(const NextUse& next_use) const {
  std::optional<Place> last;
  double moment = 0;
  bool is_there = false;
  for (std::size_t i = 0; i < held_.size(); ++i) {
    if (!held_[i].transfer || (is_there && !held_[i].is_there)) continue;
    const Place place{i / num_experts_, i % num_experts_};
    const double own = next_use.moment(place.layer, place.expert);
    if (last && own <= moment && is_there == held_[i].is_there) continue;
    last = place;
    moment = own;
    is_there = held_[i].is_there;
  }
  return last;
}

}  // namespace moerun
