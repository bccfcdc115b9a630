// What caches of one, two, three, ... slots hold at the same time: the first n of one stack.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace moerun {

// A cache with one slot more always holds what the smaller one holds and one expert besides, if all
// of them evict by the same order of experts (Mattson et al., 1970). So one list tells the contents
// of every cache, and an expert's place in it the smallest cache that has it.
class SlotStack {
 public:
  using Id = std::uint16_t;

  explicit SlotStack(std::size_t num_experts)
      : place_(num_experts, kAbsent), state_(num_experts, State::other) {
    experts_.reserve(num_experts);
  }

  static constexpr std::uint32_t kAbsent = std::numeric_limits<std::uint32_t>::max();
  // kAbsent: no cache has it.
  std::uint32_t place_of(std::size_t expert) const { return place_[expert]; }
  std::span<const Id> experts() const { return experts_; }

  // Caches with empty slots take it.
  void append(Id expert) {
    if (place_[expert] == kAbsent) set(experts_.size(), expert);
  }

  // Every cache wants all of `served`, in this order, and lets others go: those for which
  // loses(a, b), "a goes before b", is true of all that stay. With `keeps_served` a cache lets none
  // of `served` go, and gives no slot to what it has no room for; otherwise these are treated as
  // all others.
  template <typename Loses>
  void serve(std::span<const Id> served, bool keeps_served, const Loses& loses) {
    for (const Id expert : served) state_[expert] = State::waiting;
    leaving_.clear();
    const auto let_go = [&](Id expert) {
      leaving_.insert(std::upper_bound(leaving_.begin(), leaving_.end(), expert, loses), expert);
    };
    if (!keeps_served) {
      for (const Id expert : served) let_go(expert);
    }
    const std::size_t kept = keeps_served ? served.size() : 0;
    const std::size_t size = experts_.size();
    auto next = served.begin();
    for (std::size_t depth = 0;; ++depth) {
      const bool is_there = depth < size;
      const Id here = is_there ? experts_[depth] : Id{0};
      if (is_there && state_[here] == State::other) let_go(here);
      if (depth < kept) {
        // The first caches have room for served experts only: those that they had, then the
        // others as they came.
        if (is_there && state_[here] == State::waiting) {
          set(depth, here);
          state_[here] = State::placed;
          continue;
        }
        while (state_[*next] != State::waiting) ++next;
        set(depth, *next);
        state_[*next] = State::placed;
        continue;
      }
      // leaving_: what caches of `depth` slots let go, and what the cache with one slot more has
      // besides. The best of these stays in that one.
      if (leaving_.empty()) break;
      set(depth, leaving_.back());
      leaving_.pop_back();
      // All served experts were in the caches up to here: the others are as before.
      if (leaving_.empty()) break;
    }
    for (const Id expert : served) state_[expert] = State::other;
  }

 private:
  enum class State : std::uint8_t { other, waiting, placed };

  void set(std::size_t depth, Id expert) {
    if (depth == experts_.size()) experts_.push_back(expert);
    experts_[depth] = expert;
    place_[expert] = static_cast<std::uint32_t>(depth);
  }

  std::vector<Id> experts_;
  std::vector<std::uint32_t> place_;  // of each expert
  std::vector<State> state_;          // of each expert, while a token is served
  std::vector<Id> leaving_;           // the first to go first
};

}  // namespace moerun
