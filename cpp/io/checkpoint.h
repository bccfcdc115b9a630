// The tensors of a model directory, whether they lie in one safetensors file or in many.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "io/safetensors.h"

namespace moerun {

// Valid as long as the Checkpoint, also when that is moved.
struct TensorRef {
  const SafetensorsFile* file = nullptr;
  const TensorInfo* info = nullptr;
};

class Checkpoint {
 public:
  // Opens `directory`/model.safetensors, or the shards of `directory`/model.safetensors.index.json,
  // and checks all headers. Of a tensor that is in several shards the index names the one to read.
  // FileError where there is neither or a shard is missing, FormatError where the index contradicts
  // the shards.
  static Checkpoint open(const std::filesystem::path& directory);

  const TensorRef* find(std::string_view name) const;  // null: none

  // The tensor, held to a shape and to F32, F16 or BF16. FormatError otherwise.
  TensorRef require(std::string_view name, const std::vector<std::uint64_t>& expected_shape) const;

  std::vector<std::string> names() const;  // sorted
  std::uint64_t total_bytes() const;       // of all tensors
  const std::filesystem::path& directory() const { return directory_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }

  struct Opened;  // files, and what an index says of them

 private:
  Checkpoint(std::filesystem::path directory, Opened opened);

  std::filesystem::path directory_;
  std::vector<SafetensorsFile> files_;
  std::vector<TensorRef> tensors_;  // sorted by name
};

}  // namespace moerun
