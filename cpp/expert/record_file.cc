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
#include "base/hash.h"
#include "io/checkpoint_fingerprint.h"

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
constexpr const char* kFormat = "moerun-records";
constexpr int kVersion = 2;  // 1 knew weights by the sizes and times of their files
constexpr const char* kEnding = ".records";
constexpr std::size_t kMaxNameBytes = 80;  // of the model, in the header

std::uint64_t align_up(std::uint64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

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
      if (count <= 0) {  // 0: the file system took nothing and gave no reason
        fail(path_, "writing failed (what was written is kept, and the next run goes on there)",
             count < 0 ? errno : ENOSPC);
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

// The JSON at the start of a file; null where there is none.
nlohmann::json json_of(const std::string& head) {
  return nlohmann::json::parse(head.substr(0, kHeaderBytes - kMarkBytes), nullptr,
                               /*allow_exceptions=*/false);
}

bool has(const nlohmann::json& json, const char* key, const std::string& value) {
  return json.is_object() && json.contains(key) && json[key].is_string() && json[key] == value;
}

// How much of a file of this layout is safely on the disk; 0: it is not one.
std::uint64_t synced_bytes(const std::string& head, const RecordFileLayout& layout) {
  if (!layout.describes(head)) return 0;
  std::uint64_t bytes = 0;
  const char* end = head.data() + kHeaderBytes;
  const auto [stop, error] = std::from_chars(end - kMarkBytes, end, bytes);
  return error == std::errc{} && stop == end && bytes <= layout.file_bytes() ? bytes : 0;
}

fs::path resolved(const fs::path& path) {
  std::error_code error;
  const fs::path found = fs::weakly_canonical(path, error);
  return error ? path : found;
}

// Stands for a model's folder in files that people pass on.
std::string folder_mark(const fs::path& model) {
  Fnv1a hash;
  hash.add(std::string_view(resolved(model).native()));
  return hash.text();
}

// A model's name for people: short, and of letters that every system shows.
std::string short_name(const fs::path& model) {
  std::string name = resolved(model).filename().string();
  if (name.size() > kMaxNameBytes) name.resize(kMaxNameBytes);
  for (char& c : name) {
    const bool is_plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                          (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
    if (!is_plain) c = '_';
  }
  return name;
}

// Calls `visit(path, json)` for every record file in a folder, finished or not.
template <typename Visit>
void for_each_record_file(const fs::path& folder, Visit&& visit) {
  std::error_code error;
  std::vector<fs::path> found;
  fs::directory_iterator entry(folder, error);
  for (const fs::directory_iterator end; !error && entry != end; entry.increment(error)) {
    const bool is_named = entry->path().filename().string().find(kEnding) != std::string::npos;
    std::error_code unknown;
    if (is_named && entry->is_regular_file(unknown)) found.push_back(entry->path());
  }
  std::sort(found.begin(), found.end());
  for (const fs::path& path : found) {
    std::ifstream file(path, std::ios::binary);
    std::string head(kHeaderBytes, '\0');
    file.read(head.data(), static_cast<std::streamsize>(head.size()));
    const nlohmann::json json = json_of(head);
    if (has(json, "format", kFormat)) visit(path, json);
  }
}

// Whether a record file was written for the model in this folder, whatever its weights were then.
bool is_of_folder(const nlohmann::json& json, const fs::path& model) {
  // Version 1 had the folder itself.
  return has(json, "folder", folder_mark(model)) || has(json, "model", resolved(model).string());
}

RemovedFile remove_file(const fs::path& path) {
  std::error_code error;
  const std::uint64_t bytes = fs::file_size(path, error);
  if (!fs::remove(path, error) && error) fail(path, "cannot be removed", error.value());
  return {path, bytes};
}

// Weights that are not there any more leave files as large as all experts behind.
std::vector<RemovedFile> remove_stale(const RecordFileLayout& layout, const fs::path& model,
                                      const fs::path& folder) {
  std::vector<RemovedFile> removed;
  for_each_record_file(folder, [&](const fs::path& path, const nlohmann::json& json) {
    if (!is_of_folder(json, model) || has(json, "key", layout.key())) return;
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return;
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) {  // else another process writes it
      try {
        removed.push_back(remove_file(path));
      } catch (const FileError&) {  // of a folder that only others may change
      }
    }
    ::close(fd);
  });
  return removed;
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
  Fnv1a key;
  const std::string contents = fingerprint_of(weights.checkpoint()).contents;
  key.add(std::string_view(contents));
  std::uint64_t offset = kHeaderBytes;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    if (layer.experts.num_experts == 0) continue;
    const std::uint64_t stride = align_up(layer.bytes_per_expert());
    layers_.push_back({i, layer.experts.num_experts, offset, stride});
    for (const std::uint64_t size :
         {i, layer.experts.num_experts, layer.experts.intermediate_size, layer.record_bytes()}) {
      key.add(size);
    }
    offset += stride * layer.experts.num_experts;
  }
  file_bytes_ = offset;
  key_ = key.text();
  nlohmann::ordered_json json;
  json["format"] = kFormat;
  json["version"] = kVersion;
  json["name"] = short_name(model);
  json["key"] = key_;
  json["weights"] = contents;
  json["folder"] = folder_mark(model);
  json["num_layers"] = layers_.size();
  json["file_bytes"] = file_bytes_;
  header_ = json.dump();
  header_.resize(kHeaderBytes - kMarkBytes, ' ');
  header_ += mark_text(file_bytes_);
  name_ = "experts-" + key_ + kEnding;  // not the model's: a copy of it finds the file too
}

bool RecordFileLayout::describes(const std::string& head) const {
  if (head.size() != kHeaderBytes) return false;
  const nlohmann::json json = json_of(head);
  return has(json, "format", kFormat) && json.value("version", nlohmann::json()) == kVersion &&
         has(json, "key", key_) && json.value("file_bytes", nlohmann::json()) == file_bytes_;
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

std::vector<RemovedFile> write_record_file(const ModelWeights& weights,
                                           const RecordFileLayout& layout, const fs::path& folder,
                                           const LoadProgress& progress) {
  const fs::path path = layout.path_in(folder);
  const fs::path& model = weights.checkpoint().directory();
  if (fs::exists(path)) return remove_stale(layout, model, folder);
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
  return remove_stale(layout, model, folder);
}

std::vector<RemovedFile> remove_record_files(const fs::path& model, const fs::path& folder) {
  std::string contents;
  try {
    contents = fingerprint_of(Checkpoint::open(model)).contents;
  } catch (const Error&) {  // weights that are damaged or gone: their folder is known
  }
  std::vector<RemovedFile> removed;
  for_each_record_file(folder, [&](const fs::path& path, const nlohmann::json& json) {
    const bool is_same = !contents.empty() && has(json, "weights", contents);
    if (is_same || is_of_folder(json, model)) removed.push_back(remove_file(path));
  });
  return removed;
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
  if (synced_bytes(header, expected) != expected.file_bytes()) {
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
