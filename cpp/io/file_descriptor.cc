#include "io/file_descriptor.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include "base/error.h"

namespace moerun {
namespace {

constexpr std::size_t kMaxIovecs = 1024;  // IOV_MAX of Linux

std::string text_of(int error) { return std::generic_category().message(error); }

[[noreturn]] void fail_open(const std::filesystem::path& path, int error) {
  const bool is_missing = error == ENOENT || error == ENOTDIR;
  throw FileError(message(path.string(), ": ", is_missing ? "no such file" : "cannot be opened: ",
                          is_missing ? "" : text_of(error)),
                  is_missing);
}

void check_is_regular(const std::filesystem::path& path, mode_t mode) {
  if (S_ISREG(mode)) return;
  const char* found = S_ISDIR(mode)    ? "a directory"
                      : S_ISFIFO(mode) ? "a pipe"
                      : S_ISSOCK(mode) ? "a socket"
                                       : "a device";
  throw FileError(message(path.string(), ": is ", found, ", expected a regular file"));
}

std::int64_t modified_ns_of(const struct stat& info) {
  return info.st_mtim.tv_sec * std::int64_t{1'000'000'000} + info.st_mtim.tv_nsec;
}

}  // namespace

FileDescriptor::FileDescriptor(int fd, std::uint64_t size, std::filesystem::path path)
    : fd_(fd), size_(size), path_(std::move(path)) {}

FileDescriptor::FileDescriptor(FileDescriptor&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)),
      modified_ns_(other.modified_ns_),
      path_(std::move(other.path_)) {}

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  std::swap(modified_ns_, other.modified_ns_);
  std::swap(path_, other.path_);
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

void FileDescriptor::check_unchanged() const {
  struct stat info = {};
  if (::fstat(fd_, &info) != 0) {
    throw FileError(message(path_.string(), ": cannot be examined: ", text_of(errno)));
  }
  const auto size = static_cast<std::uint64_t>(info.st_size);
  if (size == size_ && modified_ns_of(info) == modified_ns_) return;
  throw FileError(message(path_.string(), ": the file was changed while the model was in use (",
                          size, " bytes, expected ", size_,
                          "); load the model again, and do not write to files of a loaded model"));
}

FileDescriptor open_regular_file(const std::filesystem::path& path) {
  struct stat info = {};
  // Before opening: opening a device can have effects, opening a pipe can wait for ever.
  if (::stat(path.c_str(), &info) != 0) fail_open(path, errno);
  check_is_regular(path, info.st_mode);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) fail_open(path, errno);
  FileDescriptor file(fd, 0, path);
  if (::fstat(fd, &info) != 0) fail_open(path, errno);
  check_is_regular(path, info.st_mode);
  file.size_ = static_cast<std::uint64_t>(info.st_size);
  file.modified_ns_ = modified_ns_of(info);
  return file;
}

void FileDescriptor::check_range(std::uint64_t offset, std::uint64_t bytes) const {
  if (offset > size_ || bytes > size_ - offset) {
    throw InvalidArgument(message(path_.string(), ": a read of ", bytes, " bytes at offset ",
                                  offset, ", expected it to end within the file's ", size_,
                                  " bytes"));
  }
}

void FileDescriptor::fail_read(std::uint64_t offset, std::int64_t result) const {
  const int error = errno;
  if (result == 0) {
    throw FileError(message(path_.string(), ": ends at offset ", offset, ", expected ", size_,
                            " bytes: the file shrank while it was open; restore it and try again"));
  }
  throw FileError(
      message(path_.string(), ": reading at offset ", offset, " failed: ", text_of(error)));
}

void FileDescriptor::read_at(std::uint64_t offset, Bytes destination) const {
  check_range(offset, destination.size());
  while (!destination.empty()) {
    const ssize_t count =
        ::pread(fd_, destination.data(), destination.size(), static_cast<off_t>(offset));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail_read(offset, count);
    destination = destination.subspan(static_cast<std::size_t>(count));
    offset += static_cast<std::uint64_t>(count);
  }
}

void FileDescriptor::read_rows_at(std::uint64_t offset, std::size_t row_bytes, std::size_t num_rows,
                                  std::byte* destination,
                                  std::size_t destination_stride_bytes) const {
  if (row_bytes == 0 || num_rows == 0) return;
  if (destination_stride_bytes < row_bytes) {
    throw InvalidArgument(message(path_.string(), ": rows of ", row_bytes,
                                  " bytes do not fit into a stride of ", destination_stride_bytes));
  }
  if (num_rows > std::numeric_limits<std::size_t>::max() / row_bytes) {
    throw InvalidArgument(message(path_.string(), ": ", num_rows, " rows of ", row_bytes,
                                  " bytes are more than an address can count"));
  }
  const std::size_t total = row_bytes * num_rows;
  check_range(offset, total);
  if (destination_stride_bytes == row_bytes) {
    read_at(offset, {destination, total});
    return;
  }
  std::array<iovec, kMaxIovecs> rows;
  for (std::size_t done = 0; done < total;) {
    // A read may stop anywhere, also in the middle of a row: go on from there.
    const std::size_t first = done / row_bytes;
    const std::size_t skip = done % row_bytes;
    const std::size_t count = std::min(num_rows - first, kMaxIovecs);
    for (std::size_t i = 0; i < count; ++i) {
      rows[i] = {destination + (first + i) * destination_stride_bytes, row_bytes};
    }
    rows[0] = {destination + first * destination_stride_bytes + skip, row_bytes - skip};
    const ssize_t got =
        ::preadv(fd_, rows.data(), static_cast<int>(count), static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail_read(offset + done, got);
    done += static_cast<std::size_t>(got);
  }
}

}  // namespace moerun
