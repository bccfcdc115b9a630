#include "kernels/segment_gemm.h"

#include "base/error.h"
#include "kernels/pair_groups.h"
#include "kernels/segment_plain.h"
#include "kernels/segment_quantum.h"
#include "kernels/segment_tiles.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kWarps = 4;
constexpr unsigned kTileColumns = 64;  // of hidden_size, a warp's share of down products
// Blocks side by side for the tokens of one expert; they take further tokens in turn.
constexpr std::size_t kMaxTokenBlocks = 8;
// That are to fit on a multiprocessor; F16 weights take more registers.
template <DType kDType>
constexpr unsigned kBlocksPerSm = kDType == DType::bf16 ? 3 : 2;

struct GemmArguments {
  const DeviceSegment* segments;  // (num_segments)
  PairGroups groups;
  std::byte* activated;  // (pairs by expert, activated_bytes): TokenNumbers of the expert's dtype
  float* partials;       // (pairs, sums_per_pair, hidden)
  unsigned num_segments;
  unsigned blocks_per_segment;
  unsigned token_blocks;
  unsigned slots;
  unsigned hidden;
  unsigned activated_bytes;
  unsigned sums_per_pair;
};

template <DType kDType>
MOERUN_DEVICE TokenNumber<kDType>* activated_row(const GemmArguments& arguments, unsigned row) {
  return reinterpret_cast<TokenNumber<kDType>*>(arguments.activated +
                                                std::size_t{row} * arguments.activated_bytes);
}

// A segment, and the pairs by expert [begin, end) that use it.
struct Task {
  DeviceSegment segment;
  unsigned begin;
  unsigned end;
};

// Nobody's, where the segment has another dtype.
template <DType kDType>
MOERUN_DEVICE Task task_of_block(const GemmArguments& arguments) {
  const DeviceSegment segment = arguments.segments[block_x() / arguments.blocks_per_segment];
  if (segment.dtype != static_cast<std::int32_t>(kDType)) return {segment, 0, 0};
  const std::int32_t* begin = arguments.groups.expert_begin + segment.expert;
  return {segment, static_cast<unsigned>(begin[0]), static_cast<unsigned>(begin[1])};
}

MOERUN_DEVICE unsigned num_token_tiles(unsigned first, unsigned end) {
  const unsigned tiles = (end - first + 7) / 8;
  return tiles < kTokenTiles ? tiles : kTokenTiles;
}

// Rows [first, first + 32) of what is activated, as far as they belong to the expert.
template <DType kDType>
MOERUN_DEVICE TileTokens<kDType> activated_tokens(const GemmArguments& arguments, unsigned first,
                                                  unsigned end) {
  TileTokens<kDType> tokens;
  tokens.num_tiles = num_token_tiles(first, end);
  MOERUN_UNROLL
  for (unsigned n = 0; n < kTokenTiles; ++n) {
    const unsigned row = first + n * 8 + lane() / 4;
    tokens.rows[n] = row < end ? activated_row<kDType>(arguments, row) : nullptr;
  }
  return tokens;
}

// The x of those rows.
template <DType kDType>
MOERUN_DEVICE TileTokens<kDType> input_tokens(const GemmArguments& arguments, unsigned first,
                                              unsigned end) {
  TileTokens<kDType> tokens;
  tokens.num_tiles = num_token_tiles(first, end);
  MOERUN_UNROLL
  for (unsigned n = 0; n < kTokenTiles; ++n) {
    const unsigned row = first + n * 8 + lane() / 4;
    tokens.rows[n] = nullptr;
    if (row < end) {
      const auto pair = static_cast<unsigned>(arguments.groups.pairs[row]);
      const std::size_t offset = std::size_t{pair / arguments.slots} * arguments.hidden;
      if constexpr (kDType == DType::bf16) {
        tokens.rows[n] = arguments.groups.x_bf16 + offset;
      } else {
        tokens.rows[n] = arguments.groups.x_tf32 + offset;
      }
    }
  }
  return tokens;
}

// Packs of gate rows (0-3) and up rows (4-7) of a lane's records, of which there are so many;
// `row` is where it reads the first of them.
MOERUN_DEVICE void load_gates_and_ups(Pack16 (&packs)[kPacks], const std::byte* row,
                                      std::size_t row_bytes, unsigned num_records) {
  MOERUN_UNROLL
  for (unsigned i = 0; i < kPacks / 2; ++i) {
    packs[i] = i < num_records ? load_once(row) : Pack16{};
    packs[i + 4] = i < num_records ? load_once(row + row_bytes) : Pack16{};
    row += 3 * row_bytes;
  }
}

// Packs of down rows of a lane's records.
MOERUN_DEVICE void load_downs(Pack16 (&packs)[kPacks], const std::byte* row, std::size_t row_bytes,
                              unsigned num_records) {
  MOERUN_UNROLL
  for (unsigned i = 0; i < kPacks; ++i) {
    packs[i] = i < num_records ? load_once(row) : Pack16{};
    row += 3 * row_bytes;
  }
}

// How many of a lane's records, from the `first` of the lane on, there are.
MOERUN_DEVICE unsigned records_left(unsigned first, unsigned num_records) {
  return first < num_records ? num_records - first : 0;
}

// Of tile m, 16 records: rows g, g + 8 are records 4g + 2m, 4g + 2m + 1, and tiles m + 2 their ups;
// so a lane writes 4 records in a row.
template <DType kDType>
MOERUN_DEVICE void store_activated(const GemmArguments& arguments, const TileSums& sums,
                                   unsigned first, unsigned end, std::size_t record) {
  MOERUN_UNROLL
  for (unsigned n = 0; n < kTokenTiles; ++n) {
    MOERUN_UNROLL
    for (unsigned c = 0; c < 2; ++c) {
      const unsigned row = first + n * 8 + lane() % 4 * 2 + c;
      if (row >= end) continue;
      float values[4];
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned at = c + i % 2 * 2;
        values[i] = silu(sums.d[i / 2][n][at]) * sums.d[i / 2 + 2][n][at];
      }
      auto* target = activated_row<kDType>(arguments, row) + record + lane() / 4 * 4;
      if constexpr (kDType == DType::bf16) {
        *reinterpret_cast<std::uint64_t*>(target) =
            pack_bf16(values[0], values[1]) | std::uint64_t{pack_bf16(values[2], values[3])} << 32;
      } else {
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) values[i] = float_of(round_to_tf32(values[i]));
        store4(target, {{values[0], values[1], values[2], values[3]}});
      }
    }
  }
}

// A block computes silu(gate . x) * (up . x) of kWarps quanta of one segment for tiles of 32 of its
// tokens; a warp has one quantum, 32 gate and 32 up rows. Records that a quantum lacks give zeros.
// kWarps warps; segments of kDType, others are left alone.
template <DType kDType>
MOERUN_KERNEL MOERUN_BOUNDS(kWarps* kWarpSize, kBlocksPerSm<kDType>)
    activate_tiles(GemmArguments arguments) {
  const Task task = task_of_block<kDType>(arguments);
  const unsigned first_record =
      (block_x() % arguments.blocks_per_segment * kWarps + warp()) * kQuantum;
  const auto num_records = static_cast<unsigned>(task.segment.num_records);
  if (first_record >= num_records) return;
  const std::size_t row_bytes = std::size_t{arguments.hidden} * 2;
  const unsigned lane_record = first_record + lane() / 4 * 4;
  const unsigned lane_records = records_left(lane_record, num_records);
  const std::size_t record = static_cast<unsigned>(task.segment.first_record) + first_record;
  const unsigned num_steps = arguments.hidden / kStep;
  for (unsigned first = task.begin + block_y() * kTileTokens; first < task.end;
       first += arguments.token_blocks * kTileTokens) {
    const auto tokens = input_tokens<kDType>(arguments, first, task.end);
    TileSums sums;
    sums.clear();
    const std::byte* row =
        task.segment.records + std::size_t{lane_record} * 3 * row_bytes + lane() % 4 * 16;
    Pack16 packs[kPacks];
    load_gates_and_ups(packs, row, row_bytes, lane_records);
    for (unsigned step = 0; step < num_steps; ++step) {
      const TileWeights weights = weights_along(packs);
      row += kStep * 2;
      if (step + 1 < num_steps) load_gates_and_ups(packs, row, row_bytes, lane_records);
      multiply_step(sums, weights, tokens, step * kStep);
    }
    store_activated<kDType>(arguments, sums, first, task.end, record);
  }
}

// Where a lane's 8 columns of a token's sum lie; null where it has none.
MOERUN_DEVICE float* sum_of(const GemmArguments& arguments, unsigned row, unsigned end,
                            unsigned column, std::size_t quantum) {
  if (row >= end || column >= arguments.hidden) return nullptr;
  const auto pair = static_cast<unsigned>(arguments.groups.pairs[row]);
  return arguments.partials +
         (std::size_t{pair} * arguments.sums_per_pair + quantum) * arguments.hidden + column;
}

// Between a lane's registers and memory: kStores, or loads.
template <bool kStores>
MOERUN_DEVICE void move_sums(const GemmArguments& arguments, TileSums& sums, unsigned first,
                             unsigned end, unsigned column, std::size_t quantum) {
  MOERUN_UNROLL
  for (unsigned n = 0; n < kTokenTiles; ++n) {
    MOERUN_UNROLL
    for (unsigned c = 0; c < 2; ++c) {
      const unsigned row = first + n * 8 + lane() % 4 * 2 + c;
      auto* target = reinterpret_cast<Pack16*>(sum_of(arguments, row, end, column, quantum));
      if (target == nullptr) continue;
      MOERUN_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        Pack16 pack = {};
        if constexpr (!kStores) pack = target[half];
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) {
          float& sum = sums.d[half * 2 + i / 2][n][i % 2 * 2 + c];
          if constexpr (kStores) {
            pack.words[i] = bits_of(sum);
          } else {
            sum = float_of(pack.words[i]);
          }
        }
        if constexpr (kStores) target[half] = pack;
      }
    }
  }
}

// Adds a segment's quanta to the sums, or stores each by itself where the work is not folded.
template <DType kDType, bool kIsFolded>
MOERUN_DEVICE void sum_segment(const GemmArguments& arguments, const DeviceSegment& segment,
                               TileSums& sums, const TileTokens<kDType>& tokens, unsigned first,
                               unsigned end, unsigned column) {
  // Lanes whose columns are outside have no records.
  const unsigned num_records =
      column < arguments.hidden ? static_cast<unsigned>(segment.num_records) : 0;
  const std::size_t row_bytes = std::size_t{arguments.hidden} * 2;
  unsigned lane_record = lane() % 4 * 8;
  const std::byte* row =
      segment.records + (std::size_t{lane_record} * 3 + 2) * row_bytes + std::size_t{column} * 2;
  Pack16 packs[kPacks];
  load_downs(packs, row, row_bytes, records_left(lane_record, num_records));
  const auto begin = static_cast<unsigned>(segment.first_record);
  const unsigned segment_end = begin + static_cast<unsigned>(segment.num_records);
  for (unsigned record = begin; record < segment_end; record += kQuantum) {
    const TileWeights weights = weights_across(packs);
    row += kQuantum * 3 * row_bytes;
    lane_record += kQuantum;
    load_downs(packs, row, row_bytes, records_left(lane_record, num_records));
    multiply_step(sums, weights, tokens, record);
    if constexpr (!kIsFolded) {
      move_sums</*kStores=*/true>(arguments, sums, first, end, column, record / kQuantum);
      sums.clear();
    }
  }
}

// A block computes kWarps * 64 columns of the down products of one segment for tiles of 32 of its
// tokens; a warp has 64 columns. Folded, the first segment of an expert in the list takes all of
// them, so that sums are added in the order of records.
// kWarps warps; segments of kDType, others are left alone.
template <DType kDType, bool kIsFolded>
MOERUN_KERNEL MOERUN_BOUNDS(kWarps* kWarpSize, kBlocksPerSm<kDType>)
    sum_tiles(GemmArguments arguments) {
  const Task task = task_of_block<kDType>(arguments);
  const unsigned own = block_x() / arguments.blocks_per_segment;
  const unsigned warp_column =
      (block_x() % arguments.blocks_per_segment * kWarps + warp()) * kTileColumns;
  if (warp_column >= arguments.hidden) return;
  const unsigned column = warp_column + lane() / 4 * 8;
  if constexpr (kIsFolded) {
    for (unsigned s = 0; s < own; ++s) {
      if (arguments.segments[s].expert == task.segment.expert) return;
    }
  }
  const unsigned last = kIsFolded ? arguments.num_segments : own + 1;
  for (unsigned first = task.begin + block_y() * kTileTokens; first < task.end;
       first += arguments.token_blocks * kTileTokens) {
    const auto tokens = activated_tokens<kDType>(arguments, first, task.end);
    TileSums sums;
    sums.clear();
    if (kIsFolded && task.segment.first_record != 0) {
      move_sums</*kStores=*/false>(arguments, sums, first, task.end, column, 0);
    }
    for (unsigned s = own; s < last; ++s) {
      const DeviceSegment segment = arguments.segments[s];
      if (segment.expert != task.segment.expert) continue;
      sum_segment<kDType, kIsFolded>(arguments, segment, sums, tokens, first, task.end, column);
    }
    if constexpr (kIsFolded) {
      move_sums</*kStores=*/true>(arguments, sums, first, task.end, column, 0);
    }
  }
}

// Of a pair, whichever expert it is of.
std::size_t activated_bytes(const ExpertShape& shape) {
  const std::size_t size = uses(shape, DType::f16)    ? sizeof(TokenNumber<DType::f16>)
                           : uses(shape, DType::bf16) ? sizeof(TokenNumber<DType::bf16>)
                                                      : 0;
  return num_quanta(std::max(shape.intermediate_size, shape.shared_intermediate_size)) *
         kQuantumRecords * size;
}

template <DType kDType>
void launch_tiles(StreamHandle stream, const ExpertWork& work, GemmArguments arguments,
                  std::size_t max_records) {
  const std::size_t token_tiles = (work.routing.tokens + kTileTokens - 1) / kTileTokens;
  arguments.token_blocks = static_cast<unsigned>(std::min(token_tiles, kMaxTokenBlocks));
  const auto issue = [&]<auto kKernel>(std::size_t warps, const char* name) {
    arguments.blocks_per_segment = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
    const LaunchShape shape{.blocks_x = arguments.num_segments * arguments.blocks_per_segment,
                            .blocks_y = arguments.token_blocks,
                            .threads = kWarps * kWarpSize};
    launch<kKernel>(stream, shape, arguments, name);
  };
  issue.template operator()<activate_tiles<kDType>>(num_quanta(max_records), "activate_tiles");
  const std::size_t warps = (arguments.hidden + kTileColumns - 1) / kTileColumns;
  if (work.is_folded) {
    issue.template operator()<sum_tiles<kDType, true>>(warps, "sum_tiles");
  } else {
    issue.template operator()<sum_tiles<kDType, false>>(warps, "sum_tiles");
  }
}

}  // namespace

std::size_t grouping_bytes(const ExpertShape& shape, std::size_t tokens, std::size_t slots) {
  std::size_t bytes = 0;
  pair_groups_in(nullptr, shape, tokens, slots, bytes);
  return bytes + tokens * slots * activated_bytes(shape);
}

void compute_segments_many(StreamHandle stream, const ExpertWork& work,
                           const DeviceSegment* segments, std::size_t num_segments,
                           std::size_t max_records, std::byte* scratch, std::size_t scratch_bytes) {
  const Routing& routing = work.routing;
  const std::size_t needed = grouping_bytes(work.shape, routing.tokens, routing.slots);
  if (scratch_bytes < needed) {
    throw InvalidArgument(message("scratch of the experts of many tokens: expected at least ",
                                  needed, " bytes, found ", scratch_bytes));
  }
  if (num_segments == 0 || max_records == 0 || routing.num_pairs() == 0) return;
  GemmArguments arguments{};
  std::size_t group_bytes = 0;
  arguments.groups =
      pair_groups_in(scratch, work.shape, routing.tokens, routing.slots, group_bytes);
  arguments.activated = scratch + group_bytes;
  arguments.segments = segments;
  arguments.partials = work.partials;
  arguments.num_segments = static_cast<unsigned>(num_segments);
  arguments.slots = static_cast<unsigned>(routing.slots);
  arguments.hidden = static_cast<unsigned>(padded(work.shape.hidden_size));
  arguments.activated_bytes = static_cast<unsigned>(activated_bytes(work.shape));
  arguments.sums_per_pair = static_cast<unsigned>(sums_per_pair(work.shape, work.is_folded));
  group_pairs(stream, work, arguments.groups);
  if (uses(work.shape, DType::bf16)) {
    launch_tiles<DType::bf16>(stream, work, arguments, max_records);
  }
  if (uses(work.shape, DType::f16)) {
    launch_tiles<DType::f16>(stream, work, arguments, max_records);
  }
  if (uses(work.shape, DType::f32)) {
    compute_segments_plain(stream, work, segments, num_segments, max_records, arguments.groups);
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
