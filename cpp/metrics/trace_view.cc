#include "metrics/trace_view.h"

#include <limits>

#include "base/error.h"

namespace moerun {

RoutingView TraceView::of_layer(std::size_t sequence, std::size_t layer,
                                std::vector<std::uint16_t>& memory) const {
  const std::size_t first = (sequence * num_layers + layer) * num_tokens * slots;
  const auto count = static_cast<std::size_t>(lengths[sequence]) * slots;
  std::visit(
      [&](const auto& ids) {
        memory.assign(ids.begin() + static_cast<std::ptrdiff_t>(first),
                      ids.begin() + static_cast<std::ptrdiff_t>(first + count));
      },
      expert_ids);
  return {memory, slots, num_experts};
}

RoutingView TraceView::of_pool(std::size_t sequence, std::vector<std::uint16_t>& memory) const {
  if (num_layers * num_experts > std::numeric_limits<std::uint16_t>::max()) {
    throw InvalidArgument(
        message("one pool over all layers: expected at most 65535 experts in all, ", "found ",
                num_layers, " layers with ", num_experts));
  }
  const auto tokens = static_cast<std::size_t>(lengths[sequence]);
  const std::size_t pool_slots = num_layers * slots;
  memory.resize(tokens * pool_slots);
  std::visit(
      [&](const auto& ids) {
        for (std::size_t layer = 0; layer < num_layers; ++layer) {
          const std::size_t first = (sequence * num_layers + layer) * num_tokens * slots;
          for (std::size_t t = 0; t < tokens; ++t) {
            for (std::size_t slot = 0; slot < slots; ++slot) {
              memory[t * pool_slots + layer * slots + slot] =
                  static_cast<std::uint16_t>(layer * num_experts + ids[first + t * slots + slot]);
            }
          }
        }
      },
      expert_ids);
  return {memory, pool_slots, num_layers * num_experts};
}

void check_trace(const TraceView& trace) {
  const std::size_t rows = trace.num_layers * trace.num_tokens;
  const std::size_t expected = trace.num_sequences() * rows * trace.slots;
  const std::size_t found =
      std::visit([](const auto& ids) { return ids.size(); }, trace.expert_ids);
  if (found != expected) {
    throw InvalidArgument(message("expert_ids: expected ", expected, " ids, found ", found));
  }
  std::vector<std::size_t> seen(trace.num_experts, 0);  // row + 1
  std::size_t row = 0;
  for (std::size_t s = 0; s < trace.num_sequences(); ++s) {
    const std::int32_t length = trace.lengths[s];
    if (length < 0 || static_cast<std::size_t>(length) > trace.num_tokens) {
      throw InvalidArgument(message("lengths[", s, "]: expected at most ", trace.num_tokens,
                                    " tokens, found ", length));
    }
    for (std::size_t layer = 0; layer < trace.num_layers; ++layer) {
      for (std::size_t t = 0; t < trace.num_tokens; ++t, ++row) {
        if (t >= static_cast<std::size_t>(length)) continue;
        for (std::size_t slot = 0; slot < trace.slots; ++slot) {
          const std::size_t expert = std::visit(
              [&](const auto& ids) -> std::size_t { return ids[row * trace.slots + slot]; },
              trace.expert_ids);
          const bool too_large = expert >= trace.num_experts;
          if (!too_large && seen[expert] != row + 1) {
            seen[expert] = row + 1;
            continue;
          }
          const auto where = message("expert_ids[", s, ", ", layer, ", ", t, ", ", slot, "]: ");
          if (!too_large) {
            throw InvalidArgument(message(where, "expert ", expert, " comes twice in a token"));
          }
          throw InvalidArgument(message(where, "expected an expert from 0 to ",
                                        trace.num_experts - 1, ", found ", expert));
        }
      }
    }
  }
}

}  // namespace moerun
