#include "kernels/expert_sum.h"

#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kColumns = kWarpSize;
constexpr unsigned kMostWarps = 16;
constexpr unsigned kAhead = 16;  // rows that a lane loads before it adds them

struct SumArguments {
  const float* partials;           // (tokens, slots, sums_per_pair, hidden)
  const std::int32_t* expert_ids;  // (tokens, slots)
  const float* expert_weights;     // (tokens, slots)
  float* y;                        // (tokens, cols), y_pitch apart
  std::size_t y_pitch;
  unsigned slots;
  unsigned sums_per_pair;
  unsigned routed_sums;  // of those, how many a routed expert has
  unsigned shared_sums;
  std::int32_t shared_id;
  unsigned hidden;
  unsigned cols;
  float scale;
};

// (P_0 + P_1) + P_2 ..., of one column.
MOERUN_DEVICE float sum_quanta(const float* partials, unsigned num_sums, unsigned hidden) {
  float sum = 0;
  for (unsigned first = 0; first < num_sums; first += kAhead) {
    float rows[kAhead];
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) {
      rows[i] = first + i < num_sums ? partials[std::size_t{first + i} * hidden] : 0.0f;
    }
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) {
      if (first + i < num_sums) sum += rows[i];
    }
  }
  return sum;
}

// A block adds up kColumns columns of one token: every warp some of its slots, a lane a column;
// then the first warp adds the slots in their order.
// Shared memory for (slots, kColumns) floats; hidden a multiple of kColumns.
MOERUN_KERNEL sum_slots(SumArguments arguments) {
  auto* slot_sums = shared_memory<float>();
  const std::size_t token = block_x();
  const unsigned column = block_y() * kColumns + lane();
  for (unsigned slot = warp(); slot < arguments.slots; slot += num_warps()) {
    const std::size_t pair = token * arguments.slots + slot;
    const bool is_shared = arguments.expert_ids[pair] == arguments.shared_id;
    slot_sums[slot * kColumns + lane()] =
        sum_quanta(arguments.partials + pair * arguments.sums_per_pair * arguments.hidden + column,
                   is_shared ? arguments.shared_sums : arguments.routed_sums, arguments.hidden);
  }
  sync_block();
  if (warp() != 0 || column >= arguments.cols) return;
  float total = 0;
  for (unsigned slot = 0; slot < arguments.slots; ++slot) {
    const float weight = arguments.expert_weights[token * arguments.slots + slot];
    total = fused_multiply_add(weight, slot_sums[slot * kColumns + lane()], total);
  }
  float& target = arguments.y[token * arguments.y_pitch + column];
  target = fused_multiply_add(arguments.scale, total, target);
}

}  // namespace

void sum_experts(StreamHandle stream, const ExpertWork& work, float scale, Activations y) {
  if (work.routing.num_pairs() == 0) return;
  const ExpertShape& shape = work.shape;
  const auto sums_of = [&](std::size_t records) {
    return static_cast<unsigned>(work.is_folded ? 1 : num_quanta(records));
  };
  const SumArguments arguments{
      work.partials,
      work.routing.expert_ids,
      work.routing.expert_weights,
      y.data,
      y.pitch,
      static_cast<unsigned>(work.routing.slots),
      static_cast<unsigned>(sums_per_pair(shape, work.is_folded)),
      sums_of(shape.intermediate_size),
      sums_of(shape.shared_intermediate_size),
      static_cast<std::int32_t>(shape.num_experts),
      static_cast<unsigned>(padded(shape.hidden_size)),
      static_cast<unsigned>(y.cols),
      scale,
  };
  const unsigned warps = std::min(arguments.slots, kMostWarps);
  const LaunchShape launch_shape{.blocks_x = static_cast<unsigned>(work.routing.tokens),
                                 .blocks_y = arguments.hidden / kColumns,
                                 .threads = warps * kWarpSize,
                                 .shared_bytes = work.routing.slots * kColumns * sizeof(float)};
  launch<sum_slots>(stream, launch_shape, arguments, "sum_slots");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
