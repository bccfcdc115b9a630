// An optional copy of all experts in the record layout: every segment of it is one read.
//
// The file: 4,096 bytes of JSON text padded with spaces (format, version, the model's name and the
// key) and a number that says how much of the file is complete, then every expert of every layer in
// order, each on a 4,096-byte border. The key stands for the contents of the weights, wherever they
// lie; the folder that they lay in is there as a hash alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "expert/expert_store.h"
#include "io/direct_file.h"
#include "weights/load_plan.h"
#include "weights/model_weights.h"

namespace moerun {

// Where everything is in the record file of a model.
class RecordFileLayout {
 public:
  // Reads samples of the weights. `model` is their folder.
  RecordFileLayout(const ModelWeights& weights, const std::filesystem::path& model);

  // The first bytes of a new file.
  const std::string& header() const { return header_; }
  // Whether a file that starts with `head` has the records of these weights.
  bool describes(const std::string& head) const;
  const std::string& key() const { return key_; }
  // Of the file in `folder`, where it belongs.
  std::filesystem::path path_in(const std::filesystem::path& folder) const;
  std::uint64_t offset(ExpertId id) const;
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::vector<ExpertId> experts() const;  // in the file's order

 private:
  struct Layer {
    std::size_t layer;
    std::size_t num_experts;
    std::uint64_t offset;  // of its first expert
    std::uint64_t stride;
  };
  std::vector<Layer> layers_;
  std::uint64_t file_bytes_ = 0;
  std::string key_;
  std::string name_;
  std::string header_;
};

struct RemovedFile {
  std::filesystem::path path;
  std::uint64_t bytes;
};

// Writes the record file unless it is there. Goes on where an earlier call was interrupted. A new
// file replaces those of weights that lay in the model's folder before; these are returned. Throws
// FileError where the folder cannot be written to, the disk is full, or another process is at it;
// and what `progress` throws, which leaves what was done for the next call.
std::vector<RemovedFile> write_record_file(const ModelWeights& weights,
                                           const RecordFileLayout& layout,
                                           const std::filesystem::path& folder,
                                           const LoadProgress& progress);

// Removes record files, finished or not, of the weights that a model has, and of those that its
// folder had before.
std::vector<RemovedFile> remove_record_files(const std::filesystem::path& model,
                                             const std::filesystem::path& folder);

// What reading experts from a record file takes, whether it has been written or not.
class RecordPieces : public PieceSizes {
 public:
  // `weights` must outlive it. `is_direct`: reads bypass the page cache and take whole sectors.
  RecordPieces(const ModelWeights& weights, RecordFileLayout layout, bool is_direct)
      : weights_(weights), layout_(std::move(layout)), is_direct_(is_direct) {}

  std::size_t num_pieces(const SegmentRead& read) const override;
  std::uint64_t piece_bytes(const SegmentRead& read, std::size_t piece) const override;
  bool is_direct() const override { return is_direct_; }

  // The bytes of a piece, counted from the start of its expert.
  struct Range {
    std::size_t begin;
    std::size_t end;
  };
  Range range_of(const SegmentRead& read, std::size_t piece) const;
  const RecordFileLayout& layout() const { return layout_; }

 private:
  const ModelWeights& weights_;
  RecordFileLayout layout_;
  bool is_direct_;
};

// Reads experts from a record file.
class RecordStore : public ExpertStore {
 public:
  // FormatError where the file is not the one that `layout` describes. `weights` must outlive it.
  RecordStore(const ModelWeights& weights, RecordFileLayout layout,
              const std::filesystem::path& path);

  std::size_t num_pieces(const SegmentRead& read) const override {
    return pieces_.num_pieces(read);
  }
  std::uint64_t read_piece(const SegmentRead& read, std::size_t piece,
                           ReadScratch& scratch) const override;
  bool is_direct() const override { return direct_.is_direct(); }
  bool is_divisible(ExpertId) const override { return true; }

 private:
  const ModelWeights& weights_;
  FileDescriptor file_;
  DirectFile direct_;
  RecordPieces pieces_;
};

}  // namespace moerun
