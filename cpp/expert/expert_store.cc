#include "expert/expert_store.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "weights/placement.h"

namespace moerun {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

std::size_t rows_per_piece(const FileMatrix& matrix, bool transposed) {
  const std::size_t rows = std::max<std::size_t>(1, kPieceBytes / matrix.row_bytes());
  // Transposed rows become columns: whole cache lines of them, or two threads would share one.
  return transposed ? padded(rows) : rows;
}

std::size_t pieces(std::size_t rows, std::size_t per_piece) {
  return (rows + per_piece - 1) / per_piece;
}

// The part of [first, first + count) that a run holds.
struct Overlap {
  std::size_t first = 0;
  std::size_t count = 0;
};

Overlap overlap(const RecordRun& run, std::size_t first, std::size_t count) {
  const std::size_t begin = std::max(run.first_record, first);
  const std::size_t end = std::min(run.first_record + run.num_records, first + count);
  return {begin, end > begin ? end - begin : 0};
}

// What kernels read behind a row's end must be zero; memory that served another type may not be.
// Of `count` records from `first` on: two pieces never write to the same place.
void clear_padding(const RecordRun& run, std::size_t first, std::size_t count, std::size_t part,
                   const ExpertShape& shape) {
  const std::size_t pitch = padded(shape.hidden_size);
  if (pitch == shape.hidden_size) return;
  const std::size_t element_bytes = size_of(shape.dtype);
  for (std::size_t record = first; record < first + count; ++record) {
    std::byte* row = run.data + (record * 3 + part) * pitch * element_bytes;
    std::memset(row + shape.hidden_size * element_bytes, 0,
                (pitch - shape.hidden_size) * element_bytes);
  }
}

}  // namespace

CheckpointStore::CheckpointStore(const ModelWeights& weights) : weights_(weights) {
  for (const LayerWeights& layer : weights.layers) {
    for (const ExpertFiles& expert : layer.expert_files) {
      for (const FileMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
        const auto known = [&](const auto& entry) { return entry.first == matrix->file; };
        if (std::any_of(files_.begin(), files_.end(), known)) continue;
        files_.emplace_back(matrix->file, std::make_unique<DirectFile>(matrix->file->file()));
      }
    }
  }
}

bool CheckpointStore::is_direct() const {
  return std::all_of(files_.begin(), files_.end(),
                     [](const auto& entry) { return entry.second->is_direct(); });
}

const DirectFile& CheckpointStore::file_of(const FileMatrix& matrix) const {
  return *std::find_if(files_.begin(), files_.end(), [&](const auto& entry) {
            return entry.first == matrix.file;
          })->second;
}

std::size_t CheckpointStore::num_pieces(const SegmentRead& read) const {
  const ExpertFiles& files = weights_.layers[read.id.layer].expert_files[read.id.expert];
  return pieces(read.num_records, rows_per_piece(files.gate, false)) +
         pieces(read.num_records, rows_per_piece(files.up, false)) +
         pieces(files.down.rows, rows_per_piece(files.down, true));
}

CheckpointStore::Piece CheckpointStore::piece_of(const SegmentRead& read, std::size_t piece) const {
  const ExpertFiles& files = weights_.layers[read.id.layer].expert_files[read.id.expert];
  const FileMatrix* matrices[] = {&files.gate, &files.up, &files.down};
  for (std::size_t part = 0; part < 3; ++part) {
    const bool is_down = part == 2;
    const std::size_t first = is_down ? 0 : read.first_record;
    const std::size_t rows = is_down ? files.down.rows : read.num_records;
    const std::size_t step = rows_per_piece(*matrices[part], is_down);
    const std::size_t count = pieces(rows, step);
    if (piece < count) {
      return {matrices[part], part, first + piece * step, std::min(step, rows - piece * step)};
    }
    piece -= count;
  }
  throw InvalidArgument(
      message("expert ", read.id.expert, " of layer ", read.id.layer, ": no piece of that number"));
}

std::uint64_t CheckpointStore::piece_bytes(const SegmentRead& read, std::size_t index) const {
  const Piece piece = piece_of(read, index);
  return file_of(*piece.matrix).file_bytes(piece.offset(), piece.bytes());
}

std::uint64_t CheckpointStore::read_piece(const SegmentRead& read, std::size_t index,
                                          ReadScratch& scratch) const {
  const Piece piece = piece_of(read, index);
  const FileMatrix& matrix = *piece.matrix;
  const ExpertShape& shape = weights_.layers[read.id.layer].experts;
  const std::size_t element_bytes = size_of(shape.dtype);
  const std::size_t row_bytes = padded(shape.hidden_size) * element_bytes;
  const std::size_t record_bytes = 3 * row_bytes;
  const auto got = file_of(matrix).read(piece.offset(), piece.bytes(), scratch.file);
  FileMatrix part = matrix;
  part.rows = piece.num_rows;
  const TypedRows rows = converted(part, got.data.data(), shape.dtype, scratch.converted);
  for (const RecordRun& run : read.runs) {
    if (piece.part == 2) {
      std::byte* target = run.data + 2 * row_bytes + piece.first_row * element_bytes;
      place_transposed(rows, run.first_record, run.num_records, {target, record_bytes});
      const bool is_last = piece.first_row + piece.num_rows == matrix.rows;
      if (is_last) clear_padding(run, 0, run.num_records, piece.part, shape);
    } else {
      const auto [first, count] = overlap(run, piece.first_row, piece.num_rows);
      std::byte* target =
          run.data + (first - run.first_record) * record_bytes + piece.part * row_bytes;
      place_rows(rows, first - piece.first_row, count, {target, record_bytes});
      clear_padding(run, first - run.first_record, count, piece.part, shape);
    }
  }
  return got.file_bytes;
}

}  // namespace moerun
