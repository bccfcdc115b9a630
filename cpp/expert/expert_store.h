// The slow tier: where experts come from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/expert_id.h"
#include "base/host_memory.h"
#include "io/direct_file.h"
#include "weights/model_weights.h"

namespace moerun {

// Where a run of an expert's records goes.
struct RecordRun {
  std::size_t first_record = 0;  // within the expert
  std::size_t num_records = 0;
  std::byte* data = nullptr;
};

// A segment to be read: the runs cover it in order.
struct SegmentRead {
  ExpertId id;
  std::size_t first_record = 0;
  std::size_t num_records = 0;
  std::vector<RecordRun> runs;
};

// Memory of one reading thread.
struct ReadScratch {
  HostMemory file;       // what came from the file
  HostMemory converted;  // that in another type
};

// How a read is cut into pieces, and what each of them takes from files: what a simulation needs.
class PieceSizes {
 public:
  virtual ~PieceSizes() = default;
  virtual std::size_t num_pieces(const SegmentRead& read) const = 0;
  // What ExpertStore::read_piece returns for it. Nothing is read.
  virtual std::uint64_t piece_bytes(const SegmentRead& read, std::size_t piece) const = 0;
  // As ExpertStore::is_direct.
  virtual bool is_direct() const = 0;
};

class ExpertStore {
 public:
  virtual ~ExpertStore() = default;
  // A read is done in pieces small enough that a more urgent one need not wait long.
  virtual std::size_t num_pieces(const SegmentRead& read) const = 0;
  // Reads one of them into the runs; pieces of one read may be done by several threads at once.
  // Returns the bytes that were read from files for it. Throws FileError.
  virtual std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                                   ReadScratch& scratch) const = 0;
  // Whether reads bypass the page cache.
  virtual bool is_direct() const = 0;
  // Whether segments of this expert cost no more when they are read in parts.
  virtual bool is_divisible(ExpertId) const { return false; }
};

// Reads experts from the checkpoint's own safetensors files and packs them into records on arrival.
// Gate and up rows of a segment lie together in the file; its down columns do not, so all of
// down_proj is read for any part of it.
class CheckpointStore : public ExpertStore, public PieceSizes {
 public:
  // `weights` and the checkpoint they came from must outlive the store.
  explicit CheckpointStore(const ModelWeights& weights);

  std::size_t num_pieces(const SegmentRead& read) const override;
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override;
  std::uint64_t piece_bytes(const SegmentRead& read, std::size_t piece) const override;
  bool is_direct() const override;

 private:
  // Rows of one of an expert's three matrices that are read together.
  struct Piece {
    const FileMatrix* matrix;
    std::size_t part;  // 0 gate, 1 up, 2 down
    std::size_t first_row;
    std::size_t num_rows;

    std::uint64_t offset() const { return matrix->offset + first_row * matrix->row_bytes(); }
    std::size_t bytes() const { return num_rows * matrix->row_bytes(); }
  };
  Piece piece_of(const SegmentRead& read, std::size_t piece) const;
  const DirectFile& file_of(const FileMatrix& matrix) const;

  const ModelWeights& weights_;
  std::vector<std::pair<const SafetensorsFile*, std::unique_ptr<DirectFile>>> files_;
};

}  // namespace moerun
