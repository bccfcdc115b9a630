// Reads past the page cache, so that a process uses the memory it says it uses.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

#include "base/host_memory.h"
#include "base/view.h"
#include "io/file_descriptor.h"

namespace moerun {

// A second way into a file that is open already. Thread-safe.
class DirectFile {
 public:
  // Opens the same file (also if its name is gone by now) with O_DIRECT. Where the file system has
  // no such thing, reads are ordinary ones and the pages they filled are given back.
  explicit DirectFile(const FileDescriptor& file);
  ~DirectFile();
  DirectFile(const DirectFile&) = delete;
  DirectFile& operator=(const DirectFile&) = delete;

  bool is_direct() const { return direct_fd_.load(std::memory_order_relaxed) >= 0; }

  // What read() takes from the file, as far as that is known before the first read.
  std::uint64_t file_bytes(std::uint64_t offset, std::size_t bytes) const {
    return is_direct() ? whole_sectors(offset, bytes) : bytes;
  }
  // The sectors that these bytes are in.
  static std::uint64_t whole_sectors(std::uint64_t offset, std::size_t bytes);

  struct Read {
    ConstBytes data;               // within `scratch`
    std::uint64_t file_bytes = 0;  // what it took: whole sectors
  };
  // FileError where the file ends first, a read fails, or the file has changed since it was opened.
  Read read(std::uint64_t offset, std::size_t bytes, HostMemory& scratch) const;

 private:
  bool read_direct(std::uint64_t begin, std::uint64_t end, std::byte* target) const;

  const FileDescriptor& file_;
  mutable std::atomic<int> direct_fd_{-1};  // -1: none, or it refused
  int owned_fd_ = -1;
};

}  // namespace moerun
