// An open regular file: positional reads only, so that threads may share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>

#include "base/view.h"

namespace moerun {

class FileDescriptor {
 public:
  FileDescriptor(FileDescriptor&& other) noexcept;
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  ~FileDescriptor();

  int get() const { return fd_; }
  // When it was opened:
  std::uint64_t size() const { return size_; }
  std::int64_t modified_ns() const { return modified_ns_; }  // since the epoch
  const std::filesystem::path& path() const { return path_; }

  // FileError where the file has been written to since it was opened.
  void check_unchanged() const;

  // Fills `destination` from `offset` on. FileError where the file ends first or a read fails.
  void read_at(std::uint64_t offset, Bytes destination) const;

  // Reads `num_rows` rows that lie one after the other in the file to addresses that are
  // `destination_stride_bytes` apart: one system call scatters up to 1,024 rows.
  void read_rows_at(std::uint64_t offset, std::size_t row_bytes, std::size_t num_rows,
                    std::byte* destination, std::size_t destination_stride_bytes) const;

 private:
  friend FileDescriptor open_regular_file(const std::filesystem::path& path);
  FileDescriptor(int fd, std::uint64_t size, std::filesystem::path path);
  void check_range(std::uint64_t offset, std::uint64_t bytes) const;
  [[noreturn]] void fail_read(std::uint64_t offset, std::int64_t result) const;

  int fd_ = -1;
  std::uint64_t size_ = 0;
  std::int64_t modified_ns_ = 0;
  std::filesystem::path path_;
};

// FileError for a directory, a pipe or a device: reading those may never end.
FileDescriptor open_regular_file(const std::filesystem::path& path);

}  // namespace moerun
