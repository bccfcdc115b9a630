#include "replay/move_sizes.h"

#include <algorithm>

namespace moerun {
namespace {

TransferSize size_of(const PieceSizes& sizes, const SegmentRead& read) {
  const std::size_t pieces = sizes.num_pieces(read);
  TransferSize size;
  size.pieces = static_cast<double>(pieces);
  for (std::size_t piece = 0; piece < pieces; ++piece) {
    size.bytes += static_cast<double>(sizes.piece_bytes(read, piece));
  }
  return size;
}

}  // namespace

std::vector<std::vector<TransferSize>> move_sizes(const ModelWeights& weights,
                                                  const PieceSizes& sizes) {
  std::vector<std::vector<TransferSize>> result;
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    const ExpertShape& shape = weights.layers[layer].experts;
    if (shape.num_experts == 0) continue;
    const auto experts = static_cast<double>(shape.num_experts);
    std::vector<TransferSize>& moves = result.emplace_back();
    for (std::size_t first = 0; first < shape.intermediate_size; first += kQuantumRecords) {
      TransferSize mean;
      for (std::size_t expert = 0; expert < shape.num_experts; ++expert) {
        const SegmentRead read{{layer, expert}, first, shape.intermediate_size - first, {}};
        const TransferSize size = size_of(sizes, read);
        mean.pieces += size.pieces / experts;
        mean.bytes += size.bytes / experts;
      }
      moves.push_back(mean);
    }
    moves.push_back({});
  }
  return result;
}

}  // namespace moerun
