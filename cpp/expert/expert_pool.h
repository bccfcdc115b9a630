// Experts that stay in the blocks where they arrived: memory that all layers share.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "expert/next_use.h"
#include "expert/transfer_engine.h"

namespace moerun {

// Whole experts. One that is being computed is taken out, so that nobody lets it go.
class ExpertPool {
 public:
  struct Held {
    std::shared_ptr<Transfer> transfer;  // keeps its blocks
    bool is_used = false;                // or else it was read ahead, and may be on its way
    bool is_there = false;
  };
  struct Place {
    std::size_t layer = 0;  // counted among those with experts
    std::size_t expert = 0;
  };

  ExpertPool(std::size_t num_layers, std::size_t num_experts);

  const Held* find(Place place) const;
  void hold(Place place, Held held);
  // Empty where it is not held.
  Held take(Place place);
  // Of a layer, those that have been used.
  std::vector<std::size_t> used_experts(std::size_t layer) const;
  std::vector<Place> unused() const;
  std::size_t num_unused() const { return num_unused_; }

  // Read ahead and on its way, as far as anybody has looked.
  std::size_t num_on_the_way() const { return on_the_way_.size(); }
  // Looks which of those have come. Returns those that have failed, which are good for nothing.
  std::vector<Place> look(TransferEngine& engine);

  // What will be used last of all; while others are held, none that is on its way.
  std::optional<Place> last_needed(const NextUse& next_use) const;

 private:
  Held& at(Place place) { return held_[place.layer * num_experts_ + place.expert]; }

  std::size_t num_experts_;
  std::vector<Held> held_;  // (layers, experts)
  std::size_t num_unused_ = 0;
  std::vector<Place> on_the_way_;
};

}  // namespace moerun
