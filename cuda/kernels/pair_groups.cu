#include "kernels/pair_groups.h"

#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kWarpSize;

struct RoundArguments {
  const float* x;                  // (tokens, cols), x_pitch apart
  const std::int32_t* expert_ids;  // (tokens, slots)
  PairGroups groups;
  std::size_t x_pitch;
  unsigned cols;
  unsigned hidden;
  unsigned slots;
};

// A block rounds one token's x, a thread two neighbours, and copies its expert ids.
MOERUN_KERNEL round_tokens(RoundArguments arguments) {
  const std::size_t token = block_x();
  const float* x = arguments.x + token * arguments.x_pitch;
  const std::size_t row = token * arguments.hidden;
  for (unsigned i = thread_x(); i < arguments.hidden / 2; i += num_threads()) {
    const float low = 2 * i < arguments.cols ? x[2 * i] : 0.0f;
    const float high = 2 * i + 1 < arguments.cols ? x[2 * i + 1] : 0.0f;
    if (arguments.groups.x_bf16 != nullptr) {
      auto* rounded = reinterpret_cast<std::uint32_t*>(arguments.groups.x_bf16 + row);
      rounded[i] = pack_bf16(low, high);
    }
    if (arguments.groups.x_tf32 != nullptr) {
      auto* rounded = reinterpret_cast<Float2*>(arguments.groups.x_tf32 + row);
      rounded[i] = {{float_of(round_to_tf32(low)), float_of(round_to_tf32(high))}};
    }
  }
  for (unsigned slot = thread_x(); slot < arguments.slots; slot += num_threads()) {
    const std::size_t pair = token * arguments.slots + slot;
    arguments.groups.expert_ids[pair] = arguments.expert_ids[pair];
  }
}

struct GroupArguments {
  PairGroups groups;
  unsigned num_pairs;
  unsigned num_ids;  // blocks
};

// A block lists the pairs of one expert: each warp looks through a run of all pairs, counting those
// of lower experts (which lie before) and its own; then it knows where to put its own.
// kThreads threads, shared memory for 2 counts a warp.
MOERUN_KERNEL list_pairs_of_expert(GroupArguments arguments) {
  auto* counts = shared_memory<unsigned>();  // (warps, 2): of lower experts, of this
  const auto expert = static_cast<std::int32_t>(block_x());
  const std::int32_t* ids = arguments.groups.expert_ids;
  const unsigned run = (arguments.num_pairs + kThreads - 1) / kThreads * kWarpSize;
  const unsigned begin = warp() * run;
  const unsigned end = begin + run < arguments.num_pairs ? begin + run : arguments.num_pairs;
  unsigned num_lower = 0;
  unsigned num_own = 0;
  for (unsigned first = begin; first < end; first += kWarpSize) {
    const unsigned pair = first + lane();
    const std::int32_t id = pair < end ? ids[pair] : expert + 1;
    num_lower += count_bits(ballot(id < expert));
    num_own += count_bits(ballot(id == expert));
  }
  if (lane() == 0) {
    counts[warp() * 2] = num_lower;
    counts[warp() * 2 + 1] = num_own;
  }
  sync_block();
  unsigned expert_begin = 0;
  unsigned next = 0;
  for (unsigned w = 0; w < kWarps; ++w) {
    expert_begin += counts[w * 2];
    if (w < warp()) next += counts[w * 2 + 1];
  }
  next += expert_begin;
  for (unsigned first = begin; first < end; first += kWarpSize) {
    const unsigned pair = first + lane();
    const bool is_own = pair < end && ids[pair] == expert;
    const unsigned votes = ballot(is_own);
    const unsigned rank = count_bits(votes & ((1u << lane()) - 1));
    if (is_own) arguments.groups.pairs[next + rank] = static_cast<std::int32_t>(pair);
    next += count_bits(votes);
  }
  if (thread_x() != 0) return;
  arguments.groups.expert_begin[block_x()] = static_cast<std::int32_t>(expert_begin);
  if (block_x() + 1 == arguments.num_ids) {
    arguments.groups.expert_begin[arguments.num_ids] =
        static_cast<std::int32_t>(arguments.num_pairs);
  }
}

}  // namespace

PairGroups pair_groups_in(std::byte* scratch, const ExpertShape& shape, std::size_t tokens,
                          std::size_t slots, std::size_t& bytes) {
  bytes = 0;
  const auto take = [&](std::size_t count, std::size_t size) {
    std::byte* part = scratch == nullptr ? nullptr : scratch + bytes;
    bytes += (count * size + 255) / 256 * 256;
    return part;
  };
  const auto take_ids = [&](std::size_t count) {
    return reinterpret_cast<std::int32_t*>(take(count, sizeof(std::int32_t)));
  };
  PairGroups groups{};
  groups.expert_ids = take_ids(tokens * slots);
  groups.expert_begin = take_ids(shape.num_experts + 2);
  groups.pairs = take_ids(tokens * slots);
  const std::size_t count = tokens * padded(shape.hidden_size);
  if (uses(shape, DType::bf16)) {
    groups.x_bf16 = reinterpret_cast<std::uint16_t*>(take(count, sizeof(std::uint16_t)));
  }
  if (uses(shape, DType::f16)) {
    groups.x_tf32 = reinterpret_cast<float*>(take(count, sizeof(float)));
  }
  return groups;
}

void group_pairs(StreamHandle stream, const ExpertWork& work, const PairGroups& groups) {
  const RoundArguments rounding{work.x.data,
                                work.routing.expert_ids,
                                groups,
                                work.x.pitch,
                                static_cast<unsigned>(work.x.cols),
                                static_cast<unsigned>(padded(work.shape.hidden_size)),
                                static_cast<unsigned>(work.routing.slots)};
  launch<round_tokens>(
      stream, {.blocks_x = static_cast<unsigned>(work.routing.tokens), .threads = kThreads},
      rounding, "round_tokens");
  const auto num_ids = static_cast<unsigned>(work.shape.num_experts + 1);
  const GroupArguments grouping{groups, static_cast<unsigned>(work.routing.num_pairs()), num_ids};
  launch<list_pairs_of_expert>(
      stream,
      {.blocks_x = num_ids, .threads = kThreads, .shared_bytes = kWarps * 2 * sizeof(unsigned)},
      grouping, "list_pairs_of_expert");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
