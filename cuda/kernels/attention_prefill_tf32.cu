// Attention of several tokens on tensor cores: tiles of query rows go over tiles of keys, with a
// softmax in float32 that is corrected when a larger score turns up.
//
// In tf32, not in bf16: keys and values lie in memory as float32 and are copied as they are, and
// errors of scores, which weigh as e^error, are an eighth. That is half the tensor cores' speed.
#include "kernels/attention_tiles.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kWarps = 4;
constexpr unsigned kThreads = kWarps * kWarpSize;
constexpr unsigned kTileRows = kWarps * 16;  // a query row is one head of one token
constexpr unsigned kTileKeys = 32;           // from multiples of that position on
constexpr unsigned kKeyTiles = kTileKeys / 8;
constexpr float kLog2E = 1.44269504f;

// Products are dealt out so that lane (g, t) = (lane / 4, lane % 4) loads 16 bytes at once, which
// is all the same to a sum as long as both factors are dealt out alike:
// - of 16 columns of a query or a key, 4t and 4t + 1 are columns t and t + 4 of one product, the
//   next two of another;
// - key g of 8 is the (g / 2 + g % 2 * 4)th, so that the lane's scores 2t, 2t + 1 are of keys t and
//   t + 4: as the product with values wants them;
// - of 32 columns of values, 4g + i is column g of product i, so that the lane's sums are those of
//   columns 8t to 8t + 7.
// Pitches are such that what a warp reads lies in different banks.
template <unsigned kDim>
struct Shared {
  static constexpr unsigned kKeyPitch = kDim + 4;
  static constexpr unsigned kValuePitch = kDim + 8;
  // Wider queries do not fit into registers beside their sums.
  static constexpr bool kHoldsQueries = kDim > 128;
  static constexpr std::size_t kBytes =
      (kTileKeys * (kKeyPitch + kValuePitch) + (kHoldsQueries ? kTileRows * kDim : 0)) *
      sizeof(float);

  float* keys = shared_memory<float>();               // (kTileKeys, kKeyPitch)
  float* values = keys + kTileKeys * kKeyPitch;       // (kTileKeys, kValuePitch)
  float* queries = values + kTileKeys * kValuePitch;  // (kWarps, kDim / 16, 2, 32, 4)
};

// A lane's share of 16 columns of its warp's query rows, for two products.
struct QueryStep {
  std::uint32_t a[2][4];
};

// The query rows of a warp. What a lane keeps is read by the same lane only.
template <unsigned kDim>
class Queries {
 public:
  static constexpr bool kIsShared = Shared<kDim>::kHoldsQueries;

  // Rows [first, first + 16), times what makes scores to powers of two.
  MOERUN_DEVICE Queries(const AttentionArguments& a, const Shared<kDim>& shared, unsigned first)
      : own_(shared.queries + (warp() * (kDim / 16) * 2 * kWarpSize + lane()) * 4) {
    const float* rows[2];
    MOERUN_UNROLL
    for (unsigned half = 0; half < 2; ++half) {
      const QueryRow query = query_row(a, first + half * 8 + lane() / 4);
      rows[half] = a.q + query.token * a.q_pitch + query.head * a.head_dim;
    }
    MOERUN_UNROLL
    for (unsigned step = 0; step < kDim / 16; ++step) {
      const unsigned col = step * 16 + lane() % 4 * 4;
      QueryStep loaded;
      MOERUN_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        const Float4 q = col < a.head_dim ? load4(rows[half] + col) : Float4{{0, 0, 0, 0}};
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) {
          loaded.a[i / 2][i % 2 * 2 + half] = round_to_tf32(q.at[i] * (a.scale * kLog2E));
        }
      }
      put(step, loaded);
    }
  }

  MOERUN_DEVICE QueryStep at(unsigned step) const {
    if constexpr (!kIsShared) {
      return held_[step];
    } else {
      QueryStep result;
      MOERUN_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        const Float4 part = load4(own_ + (step * 2 + half) * kWarpSize * 4);
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) result.a[half][i] = bits_of(part.at[i]);
      }
      return result;
    }
  }

 private:
  MOERUN_DEVICE void put(unsigned step, const QueryStep& loaded) {
    if constexpr (!kIsShared) {
      held_[step] = loaded;
    } else {
      MOERUN_UNROLL
      for (unsigned half = 0; half < 2; ++half) {
        Float4 part;
        MOERUN_UNROLL
        for (unsigned i = 0; i < 4; ++i) part.at[i] = float_of(loaded.a[half][i]);
        store4(own_ + (step * 2 + half) * kWarpSize * 4, part);
      }
    }
  }

  float* own_;
  QueryStep held_[kIsShared ? 1 : kDim / 16];
};

// Of 16 query rows and a tile of keys, as fragments: scores, then probabilities.
using TileScores = float[kKeyTiles][4];

// What a lane holds of rows g and g + 8: sums of values, as fragments, and what the softmax needs.
template <unsigned kDim>
struct Rows {
  float sums[kDim / 8][4] = {};
  float largest[2] = {-INFINITY, -INFINITY};  // the same in the four lanes of a row
  float totals[2] = {};                       // of the lane's keys
  // Keys that the rows see, counted from the block's first.
  unsigned begin[2];
  unsigned end[2];
};

template <unsigned kDim>
MOERUN_DEVICE void score(const Shared<kDim>& shared, const Queries<kDim>& queries,
                         TileScores& scores) {
  const unsigned group = lane() / 4;
  const float* own =
      shared.keys + (group / 2 + group % 2 * 4) * Shared<kDim>::kKeyPitch + lane() % 4 * 4;
  MOERUN_UNROLL
  for (unsigned step = 0; step < kDim / 16; ++step) {
    const QueryStep q = queries.at(step);
    MOERUN_UNROLL
    for (unsigned n = 0; n < kKeyTiles; ++n) {
      const Float4 k = load4(own + n * 8 * Shared<kDim>::kKeyPitch + step * 16);
      MOERUN_UNROLL
      for (unsigned i = 0; i < 2; ++i) {
        const std::uint32_t b[2] = {round_to_tf32(k.at[2 * i]), round_to_tf32(k.at[2 * i + 1])};
        multiply_tiles_tf32(scores[n], q.a[i], b);
      }
    }
  }
}

// Masks scores and makes probabilities of them, rounded to tf32, and corrects what is there
// already. A tile of which a row sees nothing changes no bit of that row.
template <unsigned kDim>
MOERUN_DEVICE void softmax(unsigned first_key, TileScores& scores, Rows<kDim>& rows) {
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    float largest = rows.largest[half];
    MOERUN_UNROLL
    for (unsigned n = 0; n < kKeyTiles; ++n) {
      MOERUN_UNROLL
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned key = first_key + n * 8 + lane() % 4 + i * 4;
        float& own = scores[n][half * 2 + i];
        if (key < rows.begin[half] || key >= rows.end[half]) own = -INFINITY;
        largest = fmaxf(largest, own);
      }
    }
    MOERUN_UNROLL
    for (unsigned mask = 1; mask <= 2; mask *= 2) {
      largest = fmaxf(largest, shuffle_xor(largest, mask));
    }
    const bool is_empty = largest == -INFINITY;
    const float factor = is_empty ? 1.0f : exp2f(rows.largest[half] - largest);
    float sum = 0;
    MOERUN_UNROLL
    for (unsigned n = 0; n < kKeyTiles; ++n) {
      MOERUN_UNROLL
      for (unsigned i = 0; i < 2; ++i) {
        float& own = scores[n][half * 2 + i];
        // As a float, too: what tf32 leaves of the low bits is for the hardware to say.
        // Of NaN alone the largest is minus infinity, too; it is passed on.
        const bool is_nothing = is_empty && own == own;
        own = is_nothing ? 0.0f : float_of(round_to_tf32(exp2f(own - largest)) & 0xffffe000u);
        sum += own;
      }
    }
    rows.largest[half] = largest;
    rows.totals[half] = rows.totals[half] * factor + sum;
    MOERUN_UNROLL
    for (unsigned c = 0; c < kDim / 8; ++c) {
      rows.sums[c][half * 2] *= factor;
      rows.sums[c][half * 2 + 1] *= factor;
    }
  }
}

// sums += probabilities of the tile . values.
template <unsigned kDim>
MOERUN_DEVICE void add_values(const Shared<kDim>& shared, const TileScores& probabilities,
                              Rows<kDim>& rows) {
  constexpr unsigned kPitch = Shared<kDim>::kValuePitch;
  const float* own = shared.values + lane() % 4 * kPitch + lane() / 4 * 4;
  MOERUN_UNROLL
  for (unsigned n = 0; n < kKeyTiles; ++n) {
    const float (&p)[4] = probabilities[n];
    const std::uint32_t a[4] = {bits_of(p[0]), bits_of(p[2]), bits_of(p[1]), bits_of(p[3])};
    MOERUN_UNROLL
    for (unsigned c = 0; c < kDim / 32; ++c) {
      const Float4 low = load4(own + n * 8 * kPitch + c * 32);
      const Float4 high = load4(own + (n * 8 + 4) * kPitch + c * 32);
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) {
        const std::uint32_t b[2] = {round_to_tf32(low.at[i]), round_to_tf32(high.at[i])};
        multiply_tiles_tf32(rows.sums[c * 4 + i], a, b);
      }
    }
  }
}

template <unsigned kDim>
MOERUN_DEVICE void store(const AttentionArguments& a, unsigned first_row, const Rows<kDim>& rows) {
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    float total = rows.totals[half];
    MOERUN_UNROLL
    for (unsigned mask = 1; mask <= 2; mask *= 2) total += shuffle_xor(total, mask);
    const float share = 1 / total;
    const unsigned row = first_row + half * 8 + lane() / 4;
    if (row >= a.tokens * (a.num_heads / a.num_kv_heads)) continue;
    const QueryRow query = query_row(a, row);
    float* out = a.out + query.token * a.out_pitch + query.head * a.head_dim;
    MOERUN_UNROLL
    for (unsigned c = 0; c < kDim / 16; ++c) {
      const unsigned col = c / 2 * 32 + lane() % 4 * 8 + c % 2 * 4;
      if (col >= a.head_dim) continue;
      Float4 result;
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) {
        result.at[i] = rows.sums[c / 2 * 4 + i][half * 2 + c % 2] * share;
      }
      store4(out + col, result);
    }
  }
}

// Blocks that shall fit on a multiprocessor, by their registers and shared memory.
template <unsigned kDim>
constexpr unsigned kBlocks = kDim <= 64    ? 4
                             : kDim <= 128 ? 2
                                           : 1;

// A block computes kTileRows query rows of one KV head, a warp 16 of them. Values arrive while
// scores are computed, and the next keys while values are added.
// Preconditions: kThreads threads; head_dim a multiple of 4, at most kDim; rows in memory on
// 16-byte borders; fewer than 2^32 keys.
template <unsigned kDim>
MOERUN_KERNEL MOERUN_BOUNDS(kThreads, kBlocks<kDim>) prefill_tf32_kernel(AttentionArguments a) {
  const Shared<kDim> shared;
  // The last rows see most keys: they begin first.
  const unsigned block_row = (num_blocks_x() - 1 - block_x()) * kTileRows;
  const unsigned first_row = block_row + warp() * 16;
  const KeyRange seen = keys_of_rows(a, block_row, kTileRows, kTileKeys);
  const auto num_keys = static_cast<unsigned>(seen.end - seen.begin);
  const std::size_t offset = (block_y() * a.capacity + seen.begin) * a.kv_pitch;
  const float* keys = a.keys + offset;
  const float* values = a.values + offset;
  const auto load = [&](const float* first, unsigned first_key, float* target, unsigned pitch) {
    load_tile<kThreads, kTileKeys, kDim>(a, first + first_key * a.kv_pitch, num_keys - first_key,
                                         target, pitch, kDim);
  };

  load(keys, 0, shared.keys, Shared<kDim>::kKeyPitch);
  const Queries<kDim> queries(a, shared, first_row);
  Rows<kDim> rows;
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    const KeyRange range = keys_of(a, query_row(a, first_row + half * 8 + lane() / 4).token);
    rows.begin[half] = static_cast<unsigned>(range.begin - seen.begin);
    rows.end[half] = static_cast<unsigned>(range.end - seen.begin);
  }
  for (unsigned first_key = 0; first_key < num_keys; first_key += kTileKeys) {
    load(values, first_key, shared.values, Shared<kDim>::kValuePitch);
    wait_for_copies<1>();
    sync_block();  // the keys are there
    TileScores scores = {};
    score(shared, queries, scores);
    softmax(first_key, scores, rows);
    wait_for_copies<0>();
    sync_block();  // the values are there, the keys are done with
    if (first_key + kTileKeys < num_keys) {
      load(keys, first_key + kTileKeys, shared.keys, Shared<kDim>::kKeyPitch);
    }
    add_values(shared, scores, rows);
    sync_block();  // the values are done with
  }
  store(a, first_row, rows);
}

template <unsigned kDim>
void launch_dim(StreamHandle stream, const AttentionArguments& a) {
  const unsigned num_rows = a.tokens * (a.num_heads / a.num_kv_heads);
  const LaunchShape shape{(num_rows + kTileRows - 1) / kTileRows, a.num_kv_heads, 1, kThreads,
                          Shared<kDim>::kBytes};
  launch<prefill_tf32_kernel<kDim>>(stream, shape, a, "attention_prefill_tf32");
}

}  // namespace

void launch_attention_prefill_tf32(StreamHandle stream, const AttentionArguments& a) {
  if (a.head_dim <= 64) return launch_dim<64>(stream, a);
  if (a.head_dim <= 128) return launch_dim<128>(stream, a);
  launch_dim<256>(stream, a);
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
