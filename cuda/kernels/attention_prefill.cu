// Attention of several tokens in float32, for models that have no fewer bits: tiles of query rows
// go over tiles of keys, with a softmax that is corrected when a larger score turns up.
#include "kernels/attention_tiles.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kThreadsX = 16;  // share a query row: half a warp
constexpr unsigned kThreadsY = kThreads / kThreadsX;
constexpr unsigned kTileRows = 64;                          // a query row is one head of one token
constexpr unsigned kTileKeys = 32;                          // from multiples of that position on
constexpr unsigned kRowsPerThread = kTileRows / kThreadsY;  // kThreadsY apart
constexpr unsigned kKeysPerThread = kTileKeys / kThreadsX;  // kThreadsX apart
constexpr unsigned kProbabilityPitch = kTileKeys + 4;

// Shared memory of a block. Rows are 16 bytes longer than they need, so that eight lanes that read
// one column of eight rows hit all banks.
struct Shared {
  unsigned pitch;
  float* queries;        // (kTileRows, pitch)
  float* keys;           // (kTileKeys, pitch)
  float* values;         // (kTileKeys, pitch)
  float* probabilities;  // (kTileRows, kProbabilityPitch)

  MOERUN_DEVICE explicit Shared(unsigned head_dim)
      : pitch(head_dim + 4),
        queries(shared_memory<float>()),
        keys(queries + kTileRows * pitch),
        values(keys + kTileKeys * pitch),
        probabilities(values + kTileKeys * pitch) {}
};
std::size_t shared_bytes(unsigned head_dim) {
  return ((kTileRows + 2 * kTileKeys) * (head_dim + 4) + kTileRows * kProbabilityPitch) *
         sizeof(float);
}

MOERUN_DEVICE void load_queries(const AttentionArguments& a, const Shared& shared,
                                unsigned first_row) {
  const unsigned quads = a.head_dim / 4;
  for (unsigned item = thread_x(); item < kTileRows * quads; item += kThreads) {
    const QueryRow query = query_row(a, first_row + item / quads);
    copy_later(shared.queries + item / quads * shared.pitch + item % quads * 4,
               a.q + query.token * a.q_pitch + query.head * a.head_dim + item % quads * 4);
  }
}

// What a thread holds of its query rows: sums for columns 4 (x + 16 c), and what the softmax needs,
// the same in the 16 threads of a row.
template <unsigned kQuads>
struct Rows {
  float sums[kRowsPerThread][kQuads][4] = {};
  float largest[kRowsPerThread];
  float totals[kRowsPerThread] = {};
  KeyRange ranges[kRowsPerThread];
};

MOERUN_DEVICE unsigned row_of(unsigned r) { return r * kThreadsY + thread_x() / kThreadsX; }

// scores[r][k] = query row r . key k of the tile, by column.
MOERUN_DEVICE void score(const AttentionArguments& a, const Shared& shared,
                         float (&scores)[kRowsPerThread][kKeysPerThread]) {
  for (unsigned col = 0; col < a.head_dim; col += 4) {
    Float4 k[kKeysPerThread];
    MOERUN_UNROLL
    for (unsigned i = 0; i < kKeysPerThread; ++i) {
      k[i] = load4(shared.keys + (i * kThreadsX + thread_x() % kThreadsX) * shared.pitch + col);
    }
    MOERUN_UNROLL
    for (unsigned r = 0; r < kRowsPerThread; ++r) {
      const Float4 q = load4(shared.queries + row_of(r) * shared.pitch + col);
      MOERUN_UNROLL
      for (unsigned i = 0; i < kKeysPerThread; ++i) {
        MOERUN_UNROLL
        for (unsigned j = 0; j < 4; ++j) {
          scores[r][i] = fused_multiply_add(q.at[j], k[i].at[j], scores[r][i]);
        }
      }
    }
  }
}

// Masks and exponentiates the scores, and corrects what is there already. A tile of which a row
// sees nothing changes no bit of that row.
template <unsigned kQuads>
MOERUN_DEVICE void softmax(const AttentionArguments& a, const Shared& shared, std::size_t first_key,
                           const float (&scores)[kRowsPerThread][kKeysPerThread],
                           Rows<kQuads>& rows) {
  MOERUN_UNROLL
  for (unsigned r = 0; r < kRowsPerThread; ++r) {
    float masked[kKeysPerThread];
    float largest = rows.largest[r];
    MOERUN_UNROLL
    for (unsigned i = 0; i < kKeysPerThread; ++i) {
      const std::size_t key = first_key + i * kThreadsX + thread_x() % kThreadsX;
      const bool is_seen = key >= rows.ranges[r].begin && key < rows.ranges[r].end;
      masked[i] = is_seen ? scores[r][i] * a.scale : -INFINITY;
      largest = fmaxf(largest, masked[i]);
    }
    MOERUN_UNROLL
    for (unsigned mask = kThreadsX / 2; mask != 0; mask /= 2) {
      largest = fmaxf(largest, shuffle_xor(largest, mask));
    }
    const bool is_empty = largest == -INFINITY;
    const float factor = is_empty ? 1.0f : expf(rows.largest[r] - largest);
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kKeysPerThread; ++i) {
      // Of NaN alone the largest is minus infinity, too; it is passed on.
      const bool is_nothing = is_empty && masked[i] == masked[i];
      const float probability = is_nothing ? 0.0f : expf(masked[i] - largest);
      shared.probabilities[row_of(r) * kProbabilityPitch + i * kThreadsX + thread_x() % kThreadsX] =
          probability;
      sum += probability;
    }
    MOERUN_UNROLL
    for (unsigned mask = kThreadsX / 2; mask != 0; mask /= 2) sum += shuffle_xor(sum, mask);
    rows.largest[r] = largest;
    rows.totals[r] = rows.totals[r] * factor + sum;
    MOERUN_UNROLL
    for (unsigned c = 0; c < kQuads; ++c) {
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) rows.sums[r][c][i] *= factor;
    }
  }
}

// sums += probabilities of the tile . values, by key.
template <unsigned kQuads>
MOERUN_DEVICE void add_values(const AttentionArguments& a, const Shared& shared,
                              Rows<kQuads>& rows) {
  for (unsigned key = 0; key < kTileKeys; key += 4) {
    Float4 p[kRowsPerThread];
    MOERUN_UNROLL
    for (unsigned r = 0; r < kRowsPerThread; ++r) {
      p[r] = load4(shared.probabilities + row_of(r) * kProbabilityPitch + key);
    }
    MOERUN_UNROLL
    for (unsigned c = 0; c < kQuads; ++c) {
      const unsigned col = (c * kThreadsX + thread_x() % kThreadsX) * 4;
      if (col >= a.head_dim) continue;
      MOERUN_UNROLL
      for (unsigned k = 0; k < 4; ++k) {
        const Float4 v = load4(shared.values + (key + k) * shared.pitch + col);
        MOERUN_UNROLL
        for (unsigned r = 0; r < kRowsPerThread; ++r) {
          MOERUN_UNROLL
          for (unsigned i = 0; i < 4; ++i) {
            rows.sums[r][c][i] = fused_multiply_add(p[r].at[k], v.at[i], rows.sums[r][c][i]);
          }
        }
      }
    }
  }
}

// A block computes kTileRows query rows of one KV head; a half warp four rows, its threads two keys
// of a tile each, then 4 kQuads columns. Values arrive while scores are computed, and the next keys
// while values are added.
// Preconditions: head_dim a multiple of 4, at most 64 kQuads; rows in memory on 16-byte borders.
template <unsigned kQuads>
MOERUN_KERNEL MOERUN_BOUNDS(kThreads, kQuads <= 2 ? 2 : 1) prefill_kernel(AttentionArguments a) {
  const Shared shared(a.head_dim);
  const unsigned num_rows = a.tokens * (a.num_heads / a.num_kv_heads);
  // The last rows see most keys: they begin first.
  const unsigned first_row = (num_blocks_x() - 1 - block_x()) * kTileRows;
  const float* keys = a.keys + block_y() * a.capacity * a.kv_pitch;
  const float* values = a.values + block_y() * a.capacity * a.kv_pitch;
  const auto [begin, end] = keys_of_rows(a, first_row, kTileRows, kTileKeys);
  const auto load = [&](const float* of_kv_head, std::size_t first_key, float* target) {
    load_tile<kThreads, kTileKeys, 64 * kQuads>(a, of_kv_head + first_key * a.kv_pitch,
                                                static_cast<unsigned>(end - first_key), target,
                                                shared.pitch, a.head_dim);
  };

  Rows<kQuads> rows;
  MOERUN_UNROLL
  for (unsigned r = 0; r < kRowsPerThread; ++r) {
    rows.largest[r] = -INFINITY;
    rows.ranges[r] = keys_of(a, query_row(a, first_row + row_of(r)).token);
  }
  load_queries(a, shared, first_row);
  load(keys, begin, shared.keys);
  for (std::size_t first_key = begin; first_key < end; first_key += kTileKeys) {
    load(values, first_key, shared.values);
    wait_for_copies<1>();
    sync_block();  // the keys are there
    float scores[kRowsPerThread][kKeysPerThread] = {};
    score(a, shared, scores);
    softmax(a, shared, first_key, scores, rows);
    wait_for_copies<0>();
    sync_block();  // values and probabilities are there, the keys are done with
    if (first_key + kTileKeys < end) load(keys, first_key + kTileKeys, shared.keys);
    add_values(a, shared, rows);
    sync_block();  // values and probabilities are done with
  }

  MOERUN_UNROLL
  for (unsigned r = 0; r < kRowsPerThread; ++r) {
    const unsigned row = first_row + row_of(r);
    if (row >= num_rows) continue;
    const QueryRow query = query_row(a, row);
    float* out = a.out + query.token * a.out_pitch + query.head * a.head_dim;
    MOERUN_UNROLL
    for (unsigned c = 0; c < kQuads; ++c) {
      const unsigned col = (c * kThreadsX + thread_x() % kThreadsX) * 4;
      if (col >= a.head_dim) continue;
      Float4 result;
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) result.at[i] = rows.sums[r][c][i] / rows.totals[r];
      store4(out + col, result);
    }
  }
}

}  // namespace

void launch_attention_prefill(StreamHandle stream, const AttentionArguments& a) {
  const unsigned num_rows = a.tokens * (a.num_heads / a.num_kv_heads);
  const LaunchShape shape{(num_rows + kTileRows - 1) / kTileRows, a.num_kv_heads, 1, kThreads,
                          shared_bytes(a.head_dim)};
  if (a.head_dim <= 64) {
    launch<prefill_kernel<1>>(stream, shape, a, "attention_prefill");
  } else if (a.head_dim <= 128) {
    launch<prefill_kernel<2>>(stream, shape, a, "attention_prefill");
  } else {
    launch<prefill_kernel<4>>(stream, shape, a, "attention_prefill");
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
