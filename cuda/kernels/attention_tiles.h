// What the kernels for several tokens share: which query rows and keys there are, and how tiles of
// keys come to shared memory.
#pragma once

#include "kernels/attention_kernels.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Query rows are numbered by token, then by head: tokens * group of them share a KV head.
struct QueryRow {
  unsigned token;
  unsigned head;
};
// A number behind the last row means that one.
MOERUN_DEVICE QueryRow query_row(const AttentionArguments& a, unsigned row) {
  const unsigned group = a.num_heads / a.num_kv_heads;
  const unsigned existing = row < a.tokens * group ? row : a.tokens * group - 1;
  return {existing / group, block_y() * group + existing % group};
}

struct KeyRange {
  std::size_t begin;
  std::size_t end;
};
MOERUN_DEVICE KeyRange keys_of(const AttentionArguments& a, unsigned token) {
  const std::size_t end = a.first_position + token + 1;
  return {a.window != 0 && end > a.window ? end - a.window : 0, end};
}

// What query rows [first, first + count) of the block's KV head see together, from the border of a
// tile on: so a row's sums do not depend on the rows beside it.
MOERUN_DEVICE KeyRange keys_of_rows(const AttentionArguments& a, unsigned first, unsigned count,
                                    unsigned tile_keys) {
  return {keys_of(a, query_row(a, first).token).begin / tile_keys * tile_keys,
          keys_of(a, query_row(a, first + count - 1).token).end};
}

// Begins to load a tile of keys or values, head_dim of up to kMaxDim columns, and fills up `width`
// of them with zeros. Rows behind the first num_keys are zero, for memory that was never written
// may hold anything.
template <unsigned kThreads, unsigned kTileKeys, unsigned kMaxDim>
MOERUN_DEVICE void load_tile(const AttentionArguments& a, const float* first_key, unsigned num_keys,
                             float* target, unsigned pitch, unsigned width) {
  constexpr unsigned kQuads = kMaxDim / 4;
  for (unsigned item = thread_x(); item < kTileKeys * kQuads; item += kThreads) {
    const unsigned key = item / kQuads;
    const unsigned col = item % kQuads * 4;
    if (col >= width) continue;
    if (key < num_keys && col < a.head_dim) {
      copy_later(target + key * pitch + col, first_key + key * a.kv_pitch + col);
    } else {
      store4(target + key * pitch + col, Float4{{0, 0, 0, 0}});
    }
  }
  commit_copies();
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
