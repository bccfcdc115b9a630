#include "kernels/segment_gemv.h"

#include "base/error.h"
#include "kernels/segment_quantum.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kMostTokens = 8;  // that a block computes at once
template <unsigned kMaxTokens>
constexpr unsigned kBlocksPerSm = kMaxTokens == 1 ? 3 : 2;

struct GemvArguments {
  const DeviceSegment* segments;   // (blocks / max_quanta), or by the id of the expert
  const std::int32_t* expert_ids;  // (tokens, slots)
  const float* x;                  // (tokens, cols), x_pitch apart
  float* partials;                 // (tokens, slots, sums_per_pair, hidden)
  std::size_t x_pitch;
  unsigned max_quanta;  // of a segment
  unsigned num_pairs;
  unsigned slots;
  unsigned cols;
  unsigned hidden;
  unsigned sums_per_pair;
  bool is_by_id;  // a block looks its expert up: that of a pair, of which every expert needs one
};

// Which pairs a block computes next; behind the QuantumMemory.
struct PairList {
  unsigned num_pairs;  // that use the expert, in all
  unsigned pairs[kMostTokens];
};

// The pairs of an expert from the `skip`-th on, in rising order; one warp.
template <unsigned kMaxTokens>
MOERUN_DEVICE void list_pairs(const GemvArguments& arguments, std::int32_t expert, unsigned skip,
                              PairList& list) {
  unsigned found = 0;
  for (unsigned first = 0; first < arguments.num_pairs; first += kWarpSize) {
    const unsigned pair = first + lane();
    const bool uses = pair < arguments.num_pairs && arguments.expert_ids[pair] == expert;
    const unsigned votes = ballot(uses);
    const unsigned position = found + count_bits(votes & ((1u << lane()) - 1));
    if (uses && position >= skip && position - skip < kMaxTokens) {
      list.pairs[position - skip] = pair;
    }
    found += count_bits(votes);
  }
  if (lane() == 0) list.num_pairs = found;
}

template <DType kDType, unsigned kMaxTokens>
MOERUN_DEVICE void compute_block(const GemvArguments& arguments, const DeviceSegment& segment,
                                 unsigned first_record) {
  const std::size_t record_bytes = std::size_t{3} * arguments.hidden / kChunk * kChunkBytes<kDType>;
  const unsigned left = static_cast<unsigned>(segment.num_records) - first_record;
  const Quantum quantum{segment.records + first_record * record_bytes,
                        left < kQuantum ? left : kQuantum, arguments.hidden};
  prefetch_first_rows<kDType>(quantum);
  const QuantumMemory memory = quantum_memory(arguments.hidden, kMaxTokens);
  auto& list = *reinterpret_cast<PairList*>(memory.activated + kQuantum * kMaxTokens);
  const std::size_t row = (static_cast<unsigned>(segment.first_record) + first_record) / kQuantum;
  for (unsigned done = 0;; done += kMaxTokens) {
    if (warp() == 0) list_pairs<kMaxTokens>(arguments, segment.expert, done, list);
    sync_block();
    if (list.num_pairs <= done) return;
    const unsigned num_left = list.num_pairs - done;
    const unsigned num_tokens = num_left < kMaxTokens ? num_left : kMaxTokens;
    for (unsigned t = 0; t < num_tokens; ++t) {
      copy_token(arguments.x + list.pairs[t] / arguments.slots * arguments.x_pitch, arguments.cols,
                 arguments.hidden, t, memory);
    }
    const auto sum_of = [&](unsigned t) {
      const std::size_t sum = std::size_t{list.pairs[t]} * arguments.sums_per_pair + row;
      return arguments.partials + sum * arguments.hidden;
    };
    compute_quantum<kDType, kMaxTokens>(quantum, memory, sum_of, num_tokens, /*accumulate=*/false);
    if (num_left <= kMaxTokens) return;
  }
}

// A block computes P_q of one quantum of one segment, for all tokens that use its expert: it reads
// the records once for kMaxTokens of them. Phase 1: a warp a record; phase 2: a thread 8 columns.
// Rows of weights on 64-byte borders; kThreads threads; kMaxTokens a power of 2.
template <unsigned kMaxTokens>
MOERUN_KERNEL MOERUN_BOUNDS(kThreads, kBlocksPerSm<kMaxTokens>)
    compute_few(GemvArguments arguments) {
  unsigned segment_idx = block_x() / arguments.max_quanta;
  if (arguments.is_by_id) {
    const std::int32_t expert = arguments.expert_ids[segment_idx];
    for (unsigned pair = 0; pair < segment_idx; ++pair) {
      if (arguments.expert_ids[pair] == expert) return;
    }
    segment_idx = static_cast<unsigned>(expert);
  }
  const DeviceSegment segment = arguments.segments[segment_idx];
  const unsigned first_record = block_x() % arguments.max_quanta * kQuantum;
  if (first_record >= static_cast<unsigned>(segment.num_records)) return;
  switch (static_cast<DType>(segment.dtype)) {
    case DType::f32:
      return compute_block<DType::f32, kMaxTokens>(arguments, segment, first_record);
    case DType::f16:
      return compute_block<DType::f16, kMaxTokens>(arguments, segment, first_record);
    case DType::bf16:
      return compute_block<DType::bf16, kMaxTokens>(arguments, segment, first_record);
  }
}

std::size_t bytes_of_block(std::size_t hidden, unsigned tokens) {
  return QuantumMemory::bytes(hidden, tokens) + sizeof(PairList);
}

template <unsigned kMaxTokens>
void launch_tokens(StreamHandle stream, const GemvArguments& arguments, std::size_t num_segments) {
  const LaunchShape shape{.blocks_x = static_cast<unsigned>(num_segments * arguments.max_quanta),
                          .threads = kThreads,
                          .shared_bytes = bytes_of_block(arguments.hidden, kMaxTokens)};
  launch<compute_few<kMaxTokens>>(stream, shape, arguments, "compute_few");
}

void launch_few(StreamHandle stream, const ExpertWork& work, const DeviceSegment* segments,
                std::size_t num_segments, std::size_t max_records, bool is_by_id) {
  if (work.is_folded) throw InvalidArgument("the experts of few tokens cannot be folded");
  if (num_segments == 0 || max_records == 0 || work.routing.num_pairs() == 0) return;
  const std::size_t hidden = padded(work.shape.hidden_size);
  const GemvArguments arguments{
      segments,
      work.routing.expert_ids,
      work.x.data,
      work.partials,
      work.x.pitch,
      static_cast<unsigned>(num_quanta(max_records)),
      static_cast<unsigned>(work.routing.num_pairs()),
      static_cast<unsigned>(work.routing.slots),
      static_cast<unsigned>(work.x.cols),
      static_cast<unsigned>(hidden),
      static_cast<unsigned>(sums_per_pair(work.shape, work.is_folded)),
      is_by_id,
  };
  const std::size_t tokens = work.routing.tokens;
  const std::size_t available = max_shared_bytes();
  const auto fits = [&](unsigned count) { return bytes_of_block(hidden, count) <= available; };
  if (tokens > 4 && fits(8)) return launch_tokens<8>(stream, arguments, num_segments);
  if (tokens > 2 && fits(4)) return launch_tokens<4>(stream, arguments, num_segments);
  if (tokens > 1 && fits(2)) return launch_tokens<2>(stream, arguments, num_segments);
  launch_tokens<1>(stream, arguments, num_segments);
}

}  // namespace

void compute_segments_few(StreamHandle stream, const ExpertWork& work,
                          const DeviceSegment* segments, std::size_t num_segments,
                          std::size_t max_records) {
  launch_few(stream, work, segments, num_segments, max_records, /*is_by_id=*/false);
}

void compute_experts_few(StreamHandle stream, const ExpertWork& work, const DeviceSegment* experts,
                         std::size_t max_records) {
  launch_few(stream, work, experts, work.routing.num_pairs(), max_records, /*is_by_id=*/true);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
