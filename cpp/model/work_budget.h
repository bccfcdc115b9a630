// How much a search may still do.
#pragma once

#include <algorithm>
#include <cstddef>

namespace moerun {

// In steps that take a nanosecond or two. They are counted, not timed, so that the same input has
// the same result on every machine.
class WorkBudget {
 public:
  explicit WorkBudget(std::size_t steps) : steps_(steps) {}
  void spend(std::size_t steps) { steps_ -= std::min(steps, steps_); }
  bool is_spent() const { return steps_ == 0; }

 private:
  std::size_t steps_;
};

}  // namespace moerun
