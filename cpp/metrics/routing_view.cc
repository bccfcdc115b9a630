#include "metrics/routing_view.h"

#include <vector>

#include "base/error.h"

namespace moerun {

void check_routing(const RoutingView& routing) {
  std::vector<std::size_t> seen(routing.num_experts, 0);  // token + 1
  for (std::size_t t = 0; t < routing.num_tokens(); ++t) {
    const auto experts = routing.token(t);
    for (std::size_t slot = 0; slot < experts.size(); ++slot) {
      const std::size_t expert = experts[slot];
      if (expert >= routing.num_experts) {
        throw InvalidArgument(message("token ", t, ", slot ", slot,
                                      ": expected an expert from 0 to ", routing.num_experts - 1,
                                      ", found ", expert));
      }
      if (seen[expert] == t + 1) {
        throw InvalidArgument(
            message("token ", t, ", slot ", slot, ": expert ", expert, " comes twice"));
      }
      seen[expert] = t + 1;
    }
  }
}

}  // namespace moerun
