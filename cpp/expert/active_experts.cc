#include "expert/active_experts.h"

#include <algorithm>

namespace moerun {

ActiveExperts active_experts(std::span<const std::int32_t> ids, std::size_t num_experts,
                             AccessMode mode) {
  ActiveExperts active;
  active.num_uses.assign(num_experts + 1, 0);
  for (const std::int32_t id : ids) {
    const auto expert = static_cast<std::size_t>(id);
    if (active.num_uses[expert]++ == 0 && expert != num_experts) active.experts.push_back(expert);
  }
  // A prompt's empty slots go to the experts that it uses most.
  if (mode == AccessMode::prefill) {
    std::stable_sort(
        active.experts.begin(), active.experts.end(),
        [&](std::size_t a, std::size_t b) { return active.num_uses[a] > active.num_uses[b]; });
  }
  return active;
}

}  // namespace moerun
