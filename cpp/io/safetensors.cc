#include "io/safetensors.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <mutex>
#include <numeric>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"
#include "io/lfs_pointer.h"

namespace moerun {

namespace {

constexpr std::size_t kMaxPointerBytes = 1024;  // as git-lfs has it

}  // namespace

class SafetensorsFile::Mapping {
 public:
  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (bytes_ != nullptr) ::munmap(bytes_, size_);
  }

  ConstBytes get(const FileDescriptor& file) {
    const std::lock_guard lock(mutex_);
    if (bytes_ == nullptr) {
      const auto size = static_cast<std::size_t>(file.size());
      void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
      if (mapped == MAP_FAILED) {
        const int error = errno;
        throw FileError(message(file.path().string(), ": ", size, " bytes cannot be mapped: ",
                                std::generic_category().message(error)));
      }
      bytes_ = mapped;
      size_ = size;
    }
    return {static_cast<const std::byte*>(bytes_), size_};
  }

 private:
  std::mutex mutex_;
  void* bytes_ = nullptr;
  std::size_t size_ = 0;
};

SafetensorsFile::SafetensorsFile(FileDescriptor file, SafetensorsHeader header)
    : file_(std::move(file)),
      header_(std::move(header)),
      by_name_(header_.tensors.size()),
      mapping_(std::make_unique<Mapping>()) {
  std::iota(by_name_.begin(), by_name_.end(), std::size_t{0});
  std::sort(by_name_.begin(), by_name_.end(), [this](std::size_t a, std::size_t b) {
    return header_.tensors[a].name < header_.tensors[b].name;
  });
}

SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;
SafetensorsFile::~SafetensorsFile() = default;

SafetensorsFile SafetensorsFile::open(const std::filesystem::path& path) {
  FileDescriptor file = open_regular_file(path);
  const std::string where = path.string();
  if (file.size() < 8) {
    throw FormatError(message(where, ": the file has ", file.size(),
                              " bytes, expected at least the 8 of a safetensors header length; it "
                              "is cut off: download it again"));
  }
  std::array<std::byte, 8> length_bytes;
  file.read_at(0, length_bytes);
  std::uint64_t length = 0;  // little-endian in the file
  for (std::size_t i = 8; i-- > 0;)
    length = length << 8 | std::to_integer<unsigned>(length_bytes[i]);
  std::string start(std::min<std::size_t>(file.size(), kMaxPointerBytes), '\0');
  file.read_at(0, std::as_writable_bytes(std::span(start)));
  check_not_lfs_pointer(start, where);
  // Before any memory is taken for it.
  if (length > kMaxSafetensorsHeaderBytes || length > file.size() - 8) {
    throw FormatError(message(where, ": header: found a length of ", length,
                              " bytes, expected at most ", kMaxSafetensorsHeaderBytes,
                              " and no more than the ", file.size() - 8,
                              " that follow in the file; it is cut off or no safetensors file: "
                              "download it again"));
  }
  std::vector<std::byte> json(static_cast<std::size_t>(length));
  file.read_at(8, json);
  SafetensorsHeader header = parse_safetensors_header(json, file.size(), where);
  return {std::move(file), std::move(header)};
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [this](std::size_t i, std::string_view key) { return header_.tensors[i].name < key; });
  if (found == by_name_.end() || header_.tensors[*found].name != name) return nullptr;
  return &header_.tensors[*found];
}

ConstBytes SafetensorsFile::map() const { return mapping_->get(file_); }

}  // namespace moerun
