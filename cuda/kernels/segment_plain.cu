#include "kernels/segment_plain.h"

#include "base/error.h"
#include "kernels/segment_quantum.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;
// Blocks side by side for the tokens of one expert; they take further tokens in turn.
constexpr std::size_t kMaxTokenBlocks = 16;

struct PlainArguments {
  const DeviceSegment* segments;  // (num_segments)
  PairGroups groups;
  const float* x;   // (tokens, cols), x_pitch apart
  float* partials;  // (pairs, sums_per_pair, hidden)
  std::size_t x_pitch;
  unsigned num_segments;
  unsigned blocks_per_segment;  // 1 where the work is folded, else a block a quantum
  unsigned token_blocks;
  unsigned slots;
  unsigned cols;
  unsigned hidden;
  unsigned sums_per_pair;
  bool is_folded;
};

// The tokens that a block computes at once: pairs by expert from `first` on.
struct TokenRun {
  unsigned first;
  unsigned count;
};

template <unsigned kMaxTokens>
MOERUN_DEVICE void compute_one(const PlainArguments& arguments, const DeviceSegment& segment,
                               unsigned first_record, const TokenRun& run,
                               const QuantumMemory& memory) {
  const std::size_t record_bytes = std::size_t{3} * arguments.hidden * sizeof(float);
  const unsigned left = static_cast<unsigned>(segment.num_records) - first_record;
  const Quantum quantum{segment.records + first_record * record_bytes,
                        left < kQuantum ? left : kQuantum, arguments.hidden};
  const std::size_t row = (static_cast<unsigned>(segment.first_record) + first_record) / kQuantum;
  const auto sum_of = [&](unsigned t) {
    const auto pair = static_cast<std::size_t>(arguments.groups.pairs[run.first + t]);
    const std::size_t sum = pair * arguments.sums_per_pair + (arguments.is_folded ? 0 : row);
    return arguments.partials + sum * arguments.hidden;
  };
  compute_quantum<DType::f32, kMaxTokens>(quantum, memory, sum_of, run.count,
                                          arguments.is_folded && row != 0);
}

// All that a block has to do for one run of tokens.
template <unsigned kMaxTokens>
MOERUN_DEVICE void compute_run(const PlainArguments& arguments, unsigned own, const TokenRun& run,
                               const QuantumMemory& memory) {
  const DeviceSegment first = arguments.segments[own];
  if (!arguments.is_folded) {
    const unsigned record = block_x() % arguments.blocks_per_segment * kQuantum;
    compute_one<kMaxTokens>(arguments, first, record, run, memory);
    return;
  }
  for (unsigned s = own; s < arguments.num_segments; ++s) {
    const DeviceSegment segment = arguments.segments[s];
    if (segment.expert != first.expert) continue;
    for (unsigned record = 0; record < static_cast<unsigned>(segment.num_records);
         record += kQuantum) {
      compute_one<kMaxTokens>(arguments, segment, record, run, memory);
    }
  }
}

// A block computes one quantum of a segment for runs of kMaxTokens of its tokens; folded, all
// quanta of an expert that the list has, in their order, if its first segment is the block's.
// kThreads threads; kMaxTokens a power of 2.
template <unsigned kMaxTokens>
MOERUN_KERNEL compute_plain(PlainArguments arguments) {
  const unsigned own = block_x() / arguments.blocks_per_segment;
  const DeviceSegment segment = arguments.segments[own];
  const unsigned first_record = block_x() % arguments.blocks_per_segment * kQuantum;
  if (segment.dtype != static_cast<std::int32_t>(DType::f32)) return;
  if (first_record >= static_cast<unsigned>(segment.num_records)) return;
  if (arguments.is_folded) {
    for (unsigned s = 0; s < own; ++s) {
      if (arguments.segments[s].expert == segment.expert) return;
    }
  }
  const QuantumMemory memory = quantum_memory(arguments.hidden, kMaxTokens);
  const auto begin = static_cast<unsigned>(arguments.groups.expert_begin[segment.expert]);
  const auto end = static_cast<unsigned>(arguments.groups.expert_begin[segment.expert + 1]);
  for (unsigned first = begin + block_y() * kMaxTokens; first < end;
       first += arguments.token_blocks * kMaxTokens) {
    const TokenRun run{first, end - first < kMaxTokens ? end - first : kMaxTokens};
    for (unsigned t = 0; t < run.count; ++t) {
      const auto pair = static_cast<std::size_t>(arguments.groups.pairs[first + t]);
      copy_token(arguments.x + pair / arguments.slots * arguments.x_pitch, arguments.cols,
                 arguments.hidden, t, memory);
    }
    compute_run<kMaxTokens>(arguments, own, run, memory);
  }
}

template <unsigned kMaxTokens>
void launch_plain(StreamHandle stream, PlainArguments arguments, std::size_t tokens) {
  const std::size_t runs = (tokens + kMaxTokens - 1) / kMaxTokens;
  arguments.token_blocks = static_cast<unsigned>(std::min(runs, kMaxTokenBlocks));
  const LaunchShape shape{.blocks_x = arguments.num_segments * arguments.blocks_per_segment,
                          .blocks_y = arguments.token_blocks,
                          .threads = kThreads,
                          .shared_bytes = QuantumMemory::bytes(arguments.hidden, kMaxTokens)};
  launch<compute_plain<kMaxTokens>>(stream, shape, arguments, "compute_plain");
}

}  // namespace

void compute_segments_plain(StreamHandle stream, const ExpertWork& work,
                            const DeviceSegment* segments, std::size_t num_segments,
                            std::size_t max_records, const PairGroups& groups) {
  PlainArguments arguments{};
  arguments.segments = segments;
  arguments.groups = groups;
  arguments.x = work.x.data;
  arguments.partials = work.partials;
  arguments.x_pitch = work.x.pitch;
  arguments.num_segments = static_cast<unsigned>(num_segments);
  arguments.blocks_per_segment =
      work.is_folded ? 1u : static_cast<unsigned>(num_quanta(max_records));
  arguments.slots = static_cast<unsigned>(work.routing.slots);
  arguments.cols = static_cast<unsigned>(work.x.cols);
  arguments.hidden = static_cast<unsigned>(padded(work.shape.hidden_size));
  arguments.sums_per_pair = static_cast<unsigned>(sums_per_pair(work.shape, work.is_folded));
  arguments.is_folded = work.is_folded;
  if (QuantumMemory::bytes(arguments.hidden, 8) <= max_shared_bytes()) {
    launch_plain<8>(stream, arguments, work.routing.tokens);
  } else {
    launch_plain<1>(stream, arguments, work.routing.tokens);
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
