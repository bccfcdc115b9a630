// A safetensors file: any bytes either open, and then every tensor lies inside the file, or throw
// a moerun::Error that names the file. Every input is tried twice: as a file, and as a header that
// fits its file, whose first eight bytes say how much data follows it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "io/safetensors.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check(const std::vector<moerun::TensorInfo>& tensors, std::uint64_t file_size) {
  for (const auto& tensor : tensors) {
    require(tensor.offset <= file_size && tensor.bytes <= file_size - tensor.offset);
  }
}

// A file in memory: nothing is written to disk.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("fuzz", MFD_CLOEXEC)) { require(fd_ >= 0); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(fd_); }

  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }
  void set(const std::uint8_t* data, std::size_t size) const {
    require(::ftruncate(fd_, 0) == 0);
    require(::pwrite(fd_, data, size, 0) == static_cast<ssize_t>(size));
  }

 private:
  int fd_;
};

void try_as_file(const std::uint8_t* data, std::size_t size) {
  static const MemoryFile memory;
  memory.set(data, size);
  const std::string path = memory.path();
  try {
    const auto file = moerun::SafetensorsFile::open(path);
    check(file.tensors(), file.file_size());
    const moerun::ConstBytes mapped = file.map();
    require(mapped.size() == size && std::memcmp(mapped.data(), data, size) == 0);
    std::vector<std::byte> bytes(size);
    for (const auto& tensor : file.tensors()) {
      require(file.find(tensor.name) == &tensor);
      const auto span = moerun::Bytes(bytes).first(tensor.bytes);
      file.read_at(tensor.offset, span);
      require(std::equal(span.begin(), span.end(), mapped.begin() + tensor.offset));
    }
  } catch (const moerun::Error& error) {
    require(std::string_view(error.what()).starts_with(path + ": "));
  }
}

void try_as_header(const std::uint8_t* data, std::size_t size) {
  if (size < 8) return;
  std::uint64_t data_bytes = 0;
  std::memcpy(&data_bytes, data, 8);
  const auto json = std::as_bytes(std::span(data + 8, size - 8));
  const std::uint64_t file_size = 8 + json.size() + data_bytes % (std::uint64_t{1} << 62);
  try {
    check(moerun::parse_safetensors_header(json, file_size, "header").tensors, file_size);
  } catch (const moerun::Error& error) {
    require(std::string_view(error.what()).starts_with("header: "));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try_as_file(data, size);
  try_as_header(data, size);
  return 0;
}
