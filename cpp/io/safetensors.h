// An open safetensors file, its header checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/view.h"
#include "io/file_descriptor.h"
#include "io/safetensors_header.h"

namespace moerun {

// Owns the file. Moving it keeps the addresses of its tensors. Reads may come from any thread.
class SafetensorsFile {
 public:
  // FileError where it cannot be read, FormatError where its header is wrong.
  static SafetensorsFile open(const std::filesystem::path& path);

  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;
  ~SafetensorsFile();

  const std::vector<TensorInfo>& tensors() const { return header_.tensors; }  // in data order
  const TensorInfo* find(std::string_view name) const;                        // null: none
  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }
  const std::filesystem::path& path() const { return file_.path(); }
  std::uint64_t file_size() const { return file_.size(); }
  const FileDescriptor& file() const { return file_; }

  // See FileDescriptor: exactly these bytes, or FileError.
  void read_at(std::uint64_t offset, Bytes destination) const {
    file_.read_at(offset, destination);
  }
  void read_rows_at(std::uint64_t offset, std::size_t row_bytes, std::size_t num_rows,
                    std::byte* destination, std::size_t destination_stride_bytes) const {
    file_.read_rows_at(offset, row_bytes, num_rows, destination, destination_stride_bytes);
  }

  // The whole file, mapped read-only by the first call; it lives as long as this object. Reading
  // it after someone cut the file off is a bus error, which is why `read_at` is the normal way.
  ConstBytes map() const;

 private:
  class Mapping;
  SafetensorsFile(FileDescriptor file, SafetensorsHeader header);

  FileDescriptor file_;
  SafetensorsHeader header_;
  std::vector<std::size_t> by_name_;  // indices of tensors, sorted by name
  std::unique_ptr<Mapping> mapping_;
};

}  // namespace moerun
