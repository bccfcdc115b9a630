// Sequences of different lengths with some new rows each, for the operations that take several.
#pragma once

#include <cmath>
#include <cstddef>
#include <vector>

#include "device/op_params.h"
#include "random_weights.h"

namespace moerun::test {

struct SequenceSize {
  std::size_t first_position;
  std::size_t num_rows;
};

// Shape, rotary parameters and sizes of a batch; who runs it keeps the numbers where it wants them.
struct SequenceBatch {
  AttentionShape shape;
  std::vector<SequenceSize> sizes;
  RotaryParams rotary;
  AttentionParams attention;
  std::vector<float> inv_freq;

  SequenceBatch(const AttentionShape& of_shape, std::vector<SequenceSize> of_sizes)
      : shape(of_shape), sizes(std::move(of_sizes)) {
    for (std::size_t i = 0; i < shape.head_dim / 2; ++i) {
      inv_freq.push_back(
          std::pow(1e4f, -2 * static_cast<float>(i) / static_cast<float>(shape.head_dim)));
    }
    rotary.inv_freq = inv_freq.data();
    attention.scale = 3 / std::sqrt(static_cast<float>(shape.head_dim));
  }
  SequenceBatch(const SequenceBatch&) = delete;
  SequenceBatch& operator=(const SequenceBatch&) = delete;

  std::size_t num_rows() const {
    std::size_t rows = 0;
    for (const SequenceSize& size : sizes) rows += size.num_rows;
    return rows;
  }
  std::size_t qkv_cols() const {
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  }
  std::size_t out_cols() const { return shape.num_heads * shape.head_dim; }
  // Of one sequence's KV cache; not the same for all.
  std::size_t capacity(std::size_t sequence) const {
    return sizes[sequence].first_position + sizes[sequence].num_rows + sequence % 3;
  }
};

}  // namespace moerun::test
