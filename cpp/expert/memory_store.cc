#include "expert/memory_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace moerun {
namespace {

// Several threads share the copying of a block.
constexpr std::size_t kPieceBytes = std::size_t{512} << 10;

}  // namespace

MemoryStore::MemoryStore(const ModelWeights& weights, const HostExperts& experts,
                         std::unique_ptr<ExpertStore> files)
    : weights_(weights), experts_(experts), files_(std::move(files)) {}

std::size_t MemoryStore::num_pieces(const SegmentRead& read) const {
  if (!is_in_memory(read.id)) return files_->num_pieces(read);
  const std::size_t bytes = read.num_records * weights_.layers[read.id.layer].record_bytes();
  return (bytes + kPieceBytes - 1) / kPieceBytes;
}

std::uint64_t MemoryStore::read_piece(const SegmentRead& read, std::size_t piece,
                                      ReadScratch& scratch) const {
  if (!is_in_memory(read.id)) return files_->read_piece(read, piece, scratch);
  const std::size_t record_bytes = weights_.layers[read.id.layer].record_bytes();
  const std::byte* records = experts_.records_of(read.id).data();
  const std::size_t begin = read.first_record * record_bytes + piece * kPieceBytes;
  const std::size_t end =
      std::min(begin + kPieceBytes, (read.first_record + read.num_records) * record_bytes);
  for (const RecordRun& run : read.runs) {
    const std::size_t run_begin = run.first_record * record_bytes;
    const std::size_t from = std::max(begin, run_begin);
    const std::size_t to = std::min(end, run_begin + run.num_records * record_bytes);
    if (from < to) std::memcpy(run.data + (from - run_begin), records + from, to - from);
  }
  return end - begin;
}

}  // namespace moerun
