#include "expert/record_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <system_error>

#include "base/bytes_text.h"
#include "base/error.h"

namespace moerun {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kHeaderBytes = 4096;
constexpr std::uint64_t kAlignment = 4096;
constexpr std::size_t kPieceBytes = std::size_t{1} << 20;
constexpr std::uint64_t kSyncBytes = std::uint64_t{256} << 20;
// The header's last bytes: a decimal number, how many bytes of the file are safely on the disk. A
// length alone would not do: after a crash it may be ahead of the data.
constexpr std::size_t kMarkBytes = 20;

std::uint64_t align_up(std::uint64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

std::string hex(std::uint64_t value) {
  std::string text(16, '0');
  for (std::size_t i = 0; i < 16; ++i) text[15 - i] = "0123456789abcdef"[value >> 4 * i & 15];
  return text;
}

std::uint64_t hash_of(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  }
  return hash;
}

[[noreturn]] void fail(const fs::path& path, const std::string& what, int error) {
  throw FileError(message(path.string(), ": ", what, ": ", std::system_category().message(error)));
}

// The unfinished file, locked against other processes.
class PartialFile {
 public:
  explicit PartialFile(const fs::path& path) : path_(path) {
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) fail(path, "cannot be written", errno);
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      ::close(fd_);
      throw FileError(message(path.string(),
                              ": another process is writing this record file; wait "
                              "for it to end"));
    }
  }
  ~PartialFile() { ::close(fd_); }
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;

  std::string head() const {
    std::string text(kHeaderBytes, '\0');
    const ssize_t got = ::pread(fd_, text.data(), text.size(), 0);
    text.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    return text;
  }
  void truncate(std::uint64_t bytes) {
    if (::ftruncate(fd_, static_cast<off_t>(bytes)) != 0) fail(path_, "cannot be cut", errno);
  }
  void write(std::uint64_t offset, const std::byte* data, std::size_t bytes) {
    while (bytes > 0) {
      const ssize_t count = ::pwrite(fd_, data, bytes, static_cast<off_t>(offset));
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) {
        fail(path_, "writing failed (what was written is kept, and the next run goes on there)",
             errno);
      }
      data += count;
      offset += static_cast<std::uint64_t>(count);
      bytes -= static_cast<std::size_t>(count);
    }
  }
  // To the disk, and out of the page cache.
  void sync() {
    if (::fdatasync(fd_) != 0) fail(path_, "writing failed", errno);
#if defined(POSIX_FADV_DONTNEED)
    ::posix_fadvise(fd_, 0, 0, POSIX_FADV_DONTNEED);
#endif
  }

 private:
  fs::path path_;
  int fd_ = -1;
};

std::string mark_text(std::uint64_t bytes) {
  std::string text = std::to_string(bytes);
  return std::string(kMarkBytes - text.size(), '0') + text;
}

// How far an unfinished file of this layout is safely on the disk; 0: it is not one.
std::uint64_t synced_bytes(const std::string& head, const RecordFileLayout& layout) {
  const std::size_t text_bytes = kHeaderBytes - kMarkBytes;
  if (head.size() != kHeaderBytes || head.compare(0, text_bytes, layout.header(), 0, text_bytes)) {
    return 0;
  }
  std::uint64_t bytes = 0;
  const char* end = head.data() + kHeaderBytes;
  const auto [stop, error] = std::from_chars(head.data() + text_bytes, end, bytes);
  return error == std::errc{} && stop == end && bytes <= layout.file_bytes() ? bytes : 0;
}

void check_room(const fs::path& folder, std::uint64_t bytes) {
  std::error_code error;
  const fs::space_info space = fs::space(folder, error);
  if (error || space.available >= bytes) return;
  throw FileError(message(folder.string(), ": the record file needs ",
                          bytes_text(bytes, Rounding::up), " more, but the disk has only ",
                          bytes_text(space.available),
                          " free; make room, or choose another folder"));
}

}  // namespace

RecordFileLayout::RecordFileLayout(const ModelWeights& weights, const fs::path& model) {
  nlohmann::ordered_json json;
  json["format"] = "moerun-records";
  json["version"] = 1;
  json["model"] = fs::weakly_canonical(model).string();
  std::string identity;
  std::vector<const SafetensorsFile*> files;
  std::uint64_t offset = kHeaderBytes;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    if (layer.experts.num_experts == 0) continue;
    const std::uint64_t stride = align_up(layer.bytes_per_expert());
    layers_.push_back({i, layer.experts.num_experts, offset, stride});
    identity += message(i, " ", layer.experts.num_experts, " ", layer.experts.intermediate_size,
                        " ", layer.record_bytes(), ";");
    for (const ExpertFiles& expert : layer.expert_files) {
      for (const FileMatrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
        if (std::find(files.begin(), files.end(), matrix->file) == files.end()) {
          files.push_back(matrix->file);
        }
      }
    }
    offset += stride * layer.experts.num_experts;
  }
  for (const SafetensorsFile* file : files) {
    identity += message(file->path().filename().string(), " ", file->file_size(), " ",
                        file->file().modified_ns(), ";");
  }
  file_bytes_ = offset;
  json["key"] = hex(hash_of(identity));
  json["num_layers"] = layers_.size();
  json["file_bytes"] = file_bytes_;
  header_ = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  if (header_.size() > kHeaderBytes - kMarkBytes) {
    throw InvalidArgument(message(model.string(), ": the path is too long for a record file"));
  }
  header_.resize(kHeaderBytes - kMarkBytes, ' ');
  header_ += mark_text(file_bytes_);
  name_ =
      fs::weakly_canonical(model).filename().string() + "-" + hex(hash_of(header_)) + ".records";
}

fs::path RecordFileLayout::path_in(const fs::path& folder) const { return folder / name_; }

std::uint64_t RecordFileLayout::offset(ExpertId id) const {
  const auto found = std::find_if(layers_.begin(), layers_.end(),
                                  [&](const Layer& layer) { return layer.layer == id.layer; });
  return found->offset + id.expert * found->stride;
}

std::vector<ExpertId> RecordFileLayout::experts() const {
  std::vector<ExpertId> ids;
  for (const Layer& layer : layers_) {
    for (std::size_t expert = 0; expert < layer.num_experts; ++expert) {
      ids.push_back({layer.layer, expert});
    }
  }
  return ids;
}

void write_record_file(const ModelWeights& weights, const RecordFileLayout& layout,
                       const fs::path& folder, const LoadProgress& progress) {
  const fs::path path = layout.path_in(folder);
  if (fs::exists(path)) return;
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) fail(folder, "cannot be created", error.value());
  const fs::path partial_path = path.string() + ".partial";
  PartialFile partial(partial_path);
  std::uint64_t written = synced_bytes(partial.head(), layout);
  if (written == 0) {
    partial.truncate(0);
    const std::string head =
        layout.header().substr(0, kHeaderBytes - kMarkBytes) + mark_text(kHeaderBytes);
    partial.write(0, reinterpret_cast<const std::byte*>(head.data()), kHeaderBytes);
    written = kHeaderBytes;
  }
  check_room(folder, layout.file_bytes() - written);

  const CheckpointStore store(weights);
  ReadScratch scratch;
  HostMemory expert;
  std::uint64_t reached = written;
  // Also on the way out of an interruption.
  const auto mark = [&] {
    partial.sync();
    written = reached;
    const std::string text = mark_text(written);
    partial.write(kHeaderBytes - kMarkBytes, reinterpret_cast<const std::byte*>(text.data()),
                  kMarkBytes);
  };
  for (const ExpertId id : layout.experts()) {
    const LayerWeights& layer = weights.layers[id.layer];
    const std::size_t bytes = layer.bytes_per_expert();
    const std::uint64_t offset = layout.offset(id);
    if (offset + align_up(bytes) <= written) continue;  // an earlier run came that far
    if (expert.size() < align_up(bytes)) expert = HostMemory(align_up(bytes), "one expert");
    const std::size_t records = layer.experts.intermediate_size;
    const SegmentRead read{id, 0, records, {{0, records, expert.data()}}};
    const std::size_t pieces = store.num_pieces(read);
    for (std::size_t piece = 0; piece < pieces; ++piece) store.read_piece(read, piece, scratch);
    partial.write(offset, expert.data(), align_up(bytes));
    reached = offset + align_up(bytes);
    if (reached - written >= kSyncBytes) mark();
    if (!progress) continue;
    try {
      progress(reached, layout.file_bytes());
    } catch (...) {
      mark();
      throw;
    }
  }
  mark();
  partial.sync();
  fs::rename(partial_path, path, error);
  if (error) fail(path, "cannot be given its name", error.value());
}

std::uint64_t remove_record_files(const fs::path& model, const fs::path& folder) {
  const std::string name = fs::weakly_canonical(model).string();
  std::uint64_t bytes = 0;
  std::error_code error;
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string file_name = entry.path().filename().string();
    if (file_name.find(".records") == std::string::npos || !entry.is_regular_file()) continue;
    std::ifstream file(entry.path(), std::ios::binary);
    std::string header(kHeaderBytes - kMarkBytes, '\0');
    file.read(header.data(), static_cast<std::streamsize>(header.size()));
    const auto json = nlohmann::json::parse(header, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) continue;
    const auto is = [&](const char* key, const std::string& value) {
      return json.contains(key) && json[key].is_string() && json[key] == value;
    };
    if (is("format", "moerun-records") && is("model", name)) found.push_back(entry.path());
  }
  for (const fs::path& path : found) {
    bytes += fs::file_size(path, error);
    if (!fs::remove(path, error) && error) fail(path, "cannot be removed", error.value());
  }
  return bytes;
}

RecordStore::RecordStore(const ModelWeights& weights, RecordFileLayout layout, const fs::path& path)
    : weights_(weights),
      file_(open_regular_file(path)),
      direct_(file_),
      pieces_(weights, std::move(layout), direct_.is_direct()) {
  std::string header(kHeaderBytes, '\0');
  const RecordFileLayout& expected = pieces_.layout();
  if (file_.size() == expected.file_bytes()) {
    file_.read_at(0, {reinterpret_cast<std::byte*>(header.data()), header.size()});
  }
  if (header != expected.header()) {
    throw FormatError(message(path.string(), ": not the record file of this checkpoint (",
                              file_.size(), " bytes, expected ", expected.file_bytes(),
                              "); remove it, and it is written anew"));
  }
}

std::size_t RecordPieces::num_pieces(const SegmentRead& read) const {
  const std::size_t bytes = read.num_records * weights_.layers[read.id.layer].record_bytes();
  return std::max<std::size_t>(1, (bytes + kPieceBytes - 1) / kPieceBytes);
}

RecordPieces::Range RecordPieces::range_of(const SegmentRead& read, std::size_t piece) const {
  const std::size_t record_bytes = weights_.layers[read.id.layer].record_bytes();
  const std::size_t begin = read.first_record * record_bytes + piece * kPieceBytes;
  return {begin,
          std::min(begin + kPieceBytes, (read.first_record + read.num_records) * record_bytes)};
}

std::uint64_t RecordPieces::piece_bytes(const SegmentRead& read, std::size_t piece) const {
  const auto [begin, end] = range_of(read, piece);
  if (!is_direct_) return end - begin;
  return DirectFile::whole_sectors(layout_.offset(read.id) + begin, end - begin);
}

std::uint64_t RecordStore::read_piece(const SegmentRead& read, std::size_t piece,
                                      ReadScratch& scratch) const {
  const std::size_t record_bytes = weights_.layers[read.id.layer].record_bytes();
  const auto [begin, end] = pieces_.range_of(read, piece);
  const auto got =
      direct_.read(pieces_.layout().offset(read.id) + begin, end - begin, scratch.file);
  for (const RecordRun& run : read.runs) {
    const std::size_t run_begin = run.first_record * record_bytes;
    const std::size_t run_end = run_begin + run.num_records * record_bytes;
    const std::size_t from = std::max(begin, run_begin);
    const std::size_t to = std::min(end, run_end);
    if (from < to)
      std::memcpy(run.data + (from - run_begin), got.data.data() + (from - begin), to - from);
  }
  return got.file_bytes;
}

}  // namespace moerun
