// Attention of one token: memory-bound, so every key and value is read once for all heads that
// share it, and enough blocks read at the same time.
#include <algorithm>

#include "kernels/attention_splits.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 128;
constexpr unsigned kMaxHeads = 8;  // of one KV head, that a block computes together

// Lanes that share a key, so that they read 128 neighbouring bytes at a time.
constexpr unsigned kLanesPerKey = 8;
constexpr unsigned kKeysPerWarp = kWarpSize / kLanesPerKey;
constexpr unsigned kKeysPerPass = kThreads / kLanesPerKey;
constexpr unsigned kPasses = kTileKeys / kKeysPerPass;

// Shared memory of a block for kHeads heads.
template <unsigned kHeads>
struct Shared {
  float* partials;       // (threads / lanes_per_value, kHeads, 4 lanes_per_value)
  float* probabilities;  // (kTileKeys, kHeads): scores first
  float* queries;        // (kHeads, head_dim)
  float* largest;        // (kHeads): score so far
  float* sums;           // (kHeads): of exponentials
  float* factors;        // (kHeads): for what came before the tile

  static constexpr unsigned kPartialFloats = kThreads * 4 * kHeads;
  static constexpr unsigned kFloats = kPartialFloats + (kTileKeys + 3) * kHeads;  // and queries
  MOERUN_DEVICE explicit Shared(unsigned head_dim)
      : partials(shared_memory<float>()),
        probabilities(partials + kPartialFloats),
        queries(probabilities + kTileKeys * kHeads),
        largest(queries + kHeads * head_dim),
        sums(largest + kHeads),
        factors(sums + kHeads) {}
};

// Scores of the keys [first, end), at most kTileKeys. Eight lanes share a key; each adds up every
// eighth quadruple, and the lanes are added in a tree.
template <unsigned kHeads>
MOERUN_DEVICE void score_tile(const AttentionArguments& a, const Shared<kHeads>& shared,
                              const float* keys, std::size_t first, std::size_t end) {
  const unsigned part = lane() % kLanesPerKey;
  const unsigned own = warp() * kKeysPerWarp + lane() / kLanesPerKey;
  float sums[kPasses][kHeads] = {};
  for (unsigned col = part * 4; col < a.head_dim; col += kLanesPerKey * 4) {
    Float4 k[kPasses];
    MOERUN_UNROLL
    for (unsigned pass = 0; pass < kPasses; ++pass) {
      const std::size_t key = first + own + pass * kKeysPerPass;
      k[pass] = load4(keys + (key < end ? key : end - 1) * a.kv_pitch + col);
    }
    MOERUN_UNROLL
    for (unsigned h = 0; h < kHeads; ++h) {
      const Float4 q = load4(shared.queries + h * a.head_dim + col);
      MOERUN_UNROLL
      for (unsigned pass = 0; pass < kPasses; ++pass) {
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) {
          sums[pass][h] = fused_multiply_add(q.at[i], k[pass].at[i], sums[pass][h]);
        }
      }
    }
  }
  MOERUN_UNROLL
  for (unsigned pass = 0; pass < kPasses; ++pass) {
    MOERUN_UNROLL
    for (unsigned h = 0; h < kHeads; ++h) {
      float score = sums[pass][h];
      MOERUN_UNROLL
      for (unsigned mask = kLanesPerKey / 2; mask != 0; mask /= 2) {
        score += shuffle_xor(score, mask);
      }
      const unsigned key = own + pass * kKeysPerPass;
      if (part == h % kLanesPerKey) {
        shared.probabilities[key * kHeads + h] = first + key < end ? score * a.scale : -INFINITY;
      }
    }
  }
}

// From scores to exponentials, relative to the largest score so far. A warp takes a head.
template <unsigned kHeads>
MOERUN_DEVICE void softmax_tile(const Shared<kHeads>& shared) {
  constexpr unsigned kPerLane = kTileKeys / kWarpSize;
  for (unsigned h = warp(); h < kHeads; h += num_warps()) {
    float scores[kPerLane];
    const float before = shared.largest[h];
    float largest = before;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      scores[i] = shared.probabilities[(i * kWarpSize + lane()) * kHeads + h];
      largest = fmaxf(largest, scores[i]);
    }
    largest = max_over_warp(largest);
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kPerLane; ++i) {
      const float probability = expf(scores[i] - largest);
      shared.probabilities[(i * kWarpSize + lane()) * kHeads + h] = probability;
      sum += probability;
    }
    sum = sum_over_warp(sum);
    if (lane() == 0) {
      const float factor = expf(before - largest);
      shared.factors[h] = factor;
      shared.largest[h] = largest;
      shared.sums[h] = shared.sums[h] * factor + sum;
    }
  }
}

// A block computes one split of the keys for kHeads heads of one KV head. Scores: eight lanes a
// key. Values: a thread holds four columns of every head, of every n-th key; added up at the end.
// Preconditions: head_dim a multiple of 4 up to 256; rows of keys and values on 16-byte borders.
template <unsigned kHeads, typename Arguments>
MOERUN_KERNEL decode_kernel(const MOERUN_IN_PLACE Arguments arguments) {
  const AttentionArguments a = own_arguments(arguments);
  const Splits splits = splits_of(a);
  if (block_x() >= splits.count) return;
  const Shared<kHeads> shared(a.head_dim);
  const unsigned group = a.num_heads / a.num_kv_heads;
  const unsigned kv_head = block_y() / arguments.head_blocks;
  const unsigned head_in_group = block_y() % arguments.head_blocks * kHeads;
  const unsigned first_head = kv_head * group + head_in_group;
  const unsigned num_heads = group - head_in_group < kHeads ? group - head_in_group : kHeads;
  const float* keys = a.keys + kv_head * a.capacity * a.kv_pitch;
  const float* values = a.values + kv_head * a.capacity * a.kv_pitch;
  const std::size_t begin = splits.first_key + block_x() * splits.keys_per_split;
  const std::size_t own_end = begin + splits.keys_per_split;
  const std::size_t end = own_end < splits.end_key ? own_end : splits.end_key;

  for (unsigned i = thread_x(); i < kHeads * a.head_dim; i += kThreads) {
    // Heads that the group does not have are computed as its last, and not written.
    const unsigned head = i / a.head_dim < num_heads ? i / a.head_dim : num_heads - 1;
    shared.queries[i] = a.q[(first_head + head) * a.head_dim + i % a.head_dim];
  }
  if (thread_x() < kHeads) {
    shared.largest[thread_x()] = -INFINITY;
    shared.sums[thread_x()] = 0;
  }
  sync_block();

  const unsigned lanes = arguments.lanes_per_value;
  const unsigned col = thread_x() % lanes * 4;
  const unsigned own_key = thread_x() / lanes;
  const unsigned key_step = kThreads / lanes;
  float sums[kHeads][4] = {};
  for (std::size_t first = begin; first < end; first += kTileKeys) {
    score_tile(a, shared, keys, first, end);
    sync_block();
    softmax_tile(shared);
    sync_block();
    const auto left = static_cast<unsigned>(end - first < kTileKeys ? end - first : kTileKeys);
    MOERUN_UNROLL
    for (unsigned h = 0; h < kHeads; ++h) {
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) sums[h][i] *= shared.factors[h];
    }
    if (col < a.head_dim) {
      MOERUN_UNROLL
      for (unsigned key = own_key; key < left; key += key_step) {
        const Float4 v = load4(values + (first + key) * a.kv_pitch + col);
        MOERUN_UNROLL
        for (unsigned h = 0; h < kHeads; ++h) {
          const float probability = shared.probabilities[key * kHeads + h];
          MOERUN_UNROLL
          for (unsigned i = 0; i < 4; ++i) {
            sums[h][i] = fused_multiply_add(probability, v.at[i], sums[h][i]);
          }
        }
      }
    }
    sync_block();  // scores of the next tile take the place of these probabilities
  }

  MOERUN_UNROLL
  for (unsigned h = 0; h < kHeads; ++h) {
    MOERUN_UNROLL
    for (unsigned i = 0; i < 4; ++i) {
      shared.partials[(own_key * kHeads + h) * lanes * 4 + col + i] = sums[h][i];
    }
  }
  sync_block();
  const std::size_t pitch = a.head_dim + kPartialExtra;
  for (unsigned i = thread_x(); i < num_heads * a.head_dim; i += kThreads) {
    const unsigned h = i / a.head_dim;
    const unsigned d = i % a.head_dim;
    float sum = 0;
    for (unsigned g = 0; g < key_step; ++g)
      sum += shared.partials[(g * kHeads + h) * lanes * 4 + d];
    if (splits.count == 1) {
      a.out[(first_head + h) * a.head_dim + d] = sum / shared.sums[h];
      continue;
    }
    float* partial = a.scratch + (std::size_t{first_head + h} * splits.count + block_x()) * pitch;
    partial[d] = sum;
    if (d == 0) {
      partial[a.head_dim] = shared.largest[h];
      partial[a.head_dim + 1] = shared.sums[h];
    }
  }
}

template <unsigned kHeads, typename Arguments>
void launch_splits(StreamHandle stream, Arguments arguments, unsigned max_splits,
                   std::size_t num_sequences) {
  const AttentionArguments& a = arguments.all;
  const unsigned group = a.num_heads / a.num_kv_heads;
  arguments.head_blocks = (group + kHeads - 1) / kHeads;
  const std::size_t shared = Shared<kHeads>::kFloats + std::size_t{kHeads} * a.head_dim;
  launch<decode_kernel<kHeads, Arguments>>(
      stream,
      {max_splits, a.num_kv_heads * arguments.head_blocks, static_cast<unsigned>(num_sequences),
       kThreads, shared * sizeof(float)},
      arguments, "attention_decode");
}

template <typename Arguments>
void launch_decode(StreamHandle stream, Arguments arguments, unsigned max_splits,
                   std::size_t num_sequences) {
  const AttentionArguments& a = arguments.all;
  arguments.lanes_per_value = kLanesPerKey;
  while (arguments.lanes_per_value * 4 < a.head_dim) arguments.lanes_per_value *= 2;
  const unsigned group = a.num_heads / a.num_kv_heads;
  if (group == 1) {
    launch_splits<1>(stream, arguments, max_splits, num_sequences);
  } else if (group == 2) {
    launch_splits<2>(stream, arguments, max_splits, num_sequences);
  } else if (group <= 4) {
    launch_splits<4>(stream, arguments, max_splits, num_sequences);
  } else {
    launch_splits<kMaxHeads>(stream, arguments, max_splits, num_sequences);
  }
}

}  // namespace

std::size_t decode_scratch_floats(std::size_t num_heads, std::size_t head_dim,
                                  std::size_t num_keys) {
  const std::size_t most =
      std::min<std::size_t>(kMaxSplits, (num_keys + kTileKeys - 1) / kTileKeys);
  return num_heads * most * (head_dim + kPartialExtra);
}

void launch_attention_decode(StreamHandle stream, const AttentionArguments& a) {
  const Splits splits = split_keys(a.first_position, a.window);
  // Of fewer keys there may be more splits, but never more than tiles.
  const std::size_t num_keys = splits.end_key - splits.first_key;
  const std::size_t num_tiles = (num_keys + kTileKeys - 1) / kTileKeys;
  const unsigned max_splits =
      a.position_on_device == nullptr
          ? splits.count
          : static_cast<unsigned>(std::min<std::size_t>(kMaxSplits, num_tiles));
  const DecodeArguments arguments{.all = a, .head_blocks = 0, .lanes_per_value = 0};
  launch_decode(stream, arguments, max_splits, 1);
  if (max_splits > 1) launch_attention_combine(stream, arguments);
}

void launch_attention_decode_each(StreamHandle stream, const AttentionArguments& a,
                                  std::span<const SequenceRows> sequences) {
  unsigned max_splits = 1;
  std::size_t most_keys = 0;
  for (const SequenceRows& each : sequences) {
    const Splits splits = split_keys(each.first_position, a.window);
    max_splits = std::max(max_splits, splits.count);
    most_keys = std::max(most_keys, splits.end_key);
  }
  DecodeEachArguments arguments{};
  arguments.all = a;
  arguments.scratch_floats = decode_scratch_floats(a.num_heads, a.head_dim, most_keys);
  arguments.sequences = list_of(sequences);
  launch_decode(stream, arguments, max_splits, sequences.size());
  if (max_splits > 1) launch_attention_combine(stream, arguments, sequences.size());
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
