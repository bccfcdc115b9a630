#include "io/checkpoint.h"

#include <algorithm>
#include <map>
#include <optional>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "io/checkpoint_index.h"
#include "io/json_text.h"
#include "io/quantized_tensors.h"
#include "io/quote.h"

namespace moerun {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleName = "model.safetensors";
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr std::uint64_t kMaxIndexBytes = std::uint64_t{64} << 20;

// What else lies in a directory without a checkpoint, to say what may be wrong with it.
std::string other_weights(const fs::path& directory) {
  std::string unread;
  std::string safetensors;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string extension = entry->path().extension().string();
    std::string& first = extension == ".safetensors" ? safetensors : unread;
    const bool is_weights = extension == ".safetensors" || extension == ".bin" ||
                            extension == ".gguf" || extension == ".pt" || extension == ".pth";
    const std::string name = entry->path().filename().string();
    // The directory's order is random: name the first by alphabet.
    if (is_weights && (first.empty() || name < first)) first = name;
  }
  if (!safetensors.empty()) {
    return message("; there is ", quote(safetensors), ", but no index that names it");
  }
  if (!unread.empty()) {
    return message("; there is ", quote(unread),
                   ", but only safetensors is read: convert the model, or download its "
                   "safetensors version");
  }
  return "; download the model's weights into it";
}

void check_is_directory(const fs::path& directory) {
  std::error_code error;
  const auto status = fs::status(directory, error);
  if (!fs::exists(status)) {
    throw FileError(message(directory.string(), ": no such directory, expected a model directory"),
                    /*not_found=*/true);
  }
  if (!fs::is_directory(status)) {
    throw FileError(message(directory.string(), ": is not a directory, expected a model directory ",
                            "with ", kSingleName));
  }
}

// True for a dangling link too: opening that says what is wrong, "no weights" would not.
bool is_present(const fs::path& path) {
  std::error_code error;
  return fs::exists(fs::symlink_status(path, error));
}

}  // namespace

struct Checkpoint::Opened {
  std::vector<SafetensorsFile> files;
  std::map<std::string, std::size_t> file_of;  // of tensors that an index names: place in `files`
};

namespace {

// Opens every shard once, and holds each to what the index says it has.
Checkpoint::Opened open_shards(const fs::path& directory) {
  const fs::path index_path = directory / kIndexName;
  const std::string where = index_path.string();
  const auto index = parse_checkpoint_index(read_text_file(index_path, kMaxIndexBytes), where);

  Checkpoint::Opened result;
  std::vector<SafetensorsFile>& files = result.files;
  std::map<std::string, std::size_t> opened;  // file name -> place in `files`
  for (const auto& [tensor, name] : index) {
    const auto [found, is_new] = opened.try_emplace(name, files.size());
    if (is_new) {
      try {
        files.push_back(SafetensorsFile::open(directory / name));
      } catch (const FileError& error) {
        throw FileError(
            message(where, ": shard ", quote(name), ", which holds tensor ", quote(tensor),
                    ", cannot be read: ", error.what(), "; download the missing part"),
            error.not_found());
      }
    }
    if (files[found->second].find(tensor) == nullptr) {
      throw FormatError(message(where, ": field 'weight_map': tensor ", quote(tensor),
                                " is not in ", quote(name),
                                ", expected it there; index and shards do not belong together"));
    }
    result.file_of.emplace(tensor, found->second);
  }
  return result;
}

Checkpoint::Opened open_files(const fs::path& directory) {
  check_is_directory(directory);
  if (is_present(directory / kSingleName)) {
    Checkpoint::Opened result;
    result.files.push_back(SafetensorsFile::open(directory / kSingleName));
    return result;
  }
  if (is_present(directory / kIndexName)) return open_shards(directory);
  throw FileError(message(directory.string(), ": no weights: looked for ", kSingleName, " and ",
                          kIndexName, other_weights(directory)),
                  /*not_found=*/true);
}

// Called where a tensor is missing or has another shape, to name the cause instead.
void refuse_quantized(const fs::path& directory, const std::vector<TensorRef>& tensors) {
  for (const TensorRef& tensor : tensors) {
    const std::string_view format = quantization_of_tensor(tensor.info->name);
    if (format.empty()) continue;
    throw UnsupportedModel(message(directory.string(), ": the weights are quantised (", format,
                                   ": there is a tensor ", quote(tensor.info->name),
                                   "), and quantised weights are not supported; download the "
                                   "unquantised version in float32, float16 or bfloat16"));
  }
}

// The name that shares the longest start and end with `name`: cheap, also among millions.
std::string closest_name(std::string_view name, const std::vector<TensorRef>& tensors) {
  std::size_t best_length = 0;
  const std::string* best = nullptr;
  for (const TensorRef& tensor : tensors) {
    const std::string& other = tensor.info->name;
    const std::size_t shorter = std::min(name.size(), other.size());
    std::size_t start = 0;
    while (start < shorter && name[start] == other[start]) ++start;
    std::size_t end = 0;
    while (end < shorter - start && name[name.size() - 1 - end] == other[other.size() - 1 - end]) {
      ++end;
    }
    if (start + end > best_length) {
      best_length = start + end;
      best = &other;
    }
  }
  return best != nullptr && best_length * 2 >= name.size() ? *best : "";
}

}  // namespace

Checkpoint::Checkpoint(fs::path directory, Opened opened)
    : directory_(std::move(directory)), files_(std::move(opened.files)) {
  for (const SafetensorsFile& file : files_) {
    for (const TensorInfo& info : file.tensors()) {
      // Other shards may hold an older version of a tensor, or a copy: the index decides.
      const auto indexed = opened.file_of.find(info.name);
      const bool is_shadowed = indexed != opened.file_of.end() && &files_[indexed->second] != &file;
      if (!is_shadowed) tensors_.push_back({&file, &info});
    }
  }
  std::sort(tensors_.begin(), tensors_.end(),
            [](const TensorRef& a, const TensorRef& b) { return a.info->name < b.info->name; });
  const auto twice = std::adjacent_find(
      tensors_.begin(), tensors_.end(),
      [](const TensorRef& a, const TensorRef& b) { return a.info->name == b.info->name; });
  if (twice != tensors_.end()) {
    const auto name_of = [&](const TensorRef& tensor) {
      return tensor.file->path().lexically_relative(directory_).string();
    };
    throw FormatError(message((directory_ / kIndexName).string(), ": tensor ",
                              quote(twice->info->name), " is in two shards, ",
                              quote(name_of(*twice)), " and ", quote(name_of(*std::next(twice))),
                              ", and field 'weight_map' does not say which is meant; add it there, "
                              "or download the index again"));
  }
}

Checkpoint Checkpoint::open(const fs::path& directory) {
  return {directory, open_files(directory)};
}

const TensorRef* Checkpoint::find(std::string_view name) const {
  const auto found = std::lower_bound(
      tensors_.begin(), tensors_.end(), name,
      [](const TensorRef& tensor, std::string_view key) { return tensor.info->name < key; });
  return found != tensors_.end() && found->info->name == name ? &*found : nullptr;
}

TensorRef Checkpoint::require(std::string_view name,
                              const std::vector<std::uint64_t>& expected_shape) const {
  const TensorRef* tensor = find(name);
  if (tensor == nullptr) {
    refuse_quantized(directory_, tensors_);
    const std::string closest = closest_name(name, tensors_);
    throw FormatError(
        message(directory_.string(), ": tensor ", quote(name), " is missing, expected shape ",
                shape_text(expected_shape), "; none of the ", tensors_.size(),
                " tensors there has that name",
                closest.empty() ? "" : message(" (the closest is ", quote(closest), ")"),
                "; do config.json and weights belong together?"));
  }
  const std::string at = message(tensor->file->path().string(), ": tensor ", quote(name), ": ");
  if (tensor->info->shape != expected_shape) {
    refuse_quantized(directory_, tensors_);
    throw FormatError(message(at, "found shape ", shape_text(tensor->info->shape), ", expected ",
                              shape_text(expected_shape),
                              "; do config.json and weights belong together?"));
  }
  if (!tensor->info->dtype) {
    throw FormatError(message(at, "found dtype ", tensor->info->dtype_name,
                              ", expected F32, F16 or BF16; convert the model, or download a "
                              "version that is not quantised"));
  }
  return *tensor;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(tensors_.size());
  for (const TensorRef& tensor : tensors_) names.push_back(tensor.info->name);
  return names;
}

std::uint64_t Checkpoint::total_bytes() const {
  std::uint64_t total = 0;
  for (const TensorRef& tensor : tensors_) total += tensor.info->bytes;
  return total;
}

}  // namespace moerun
