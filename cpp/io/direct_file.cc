#include "io/direct_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>

#include "base/error.h"

namespace moerun {
namespace {

// Covers the sector sizes of all common disks and the page, which buffers must be aligned to.
constexpr std::uint64_t kAlignment = 4096;

std::uint64_t align_down(std::uint64_t n) { return n / kAlignment * kAlignment; }
std::uint64_t align_up(std::uint64_t n) { return align_down(n + kAlignment - 1); }

}  // namespace

DirectFile::DirectFile(const FileDescriptor& file) : file_(file) {
#if defined(O_DIRECT)
  const std::string same_file = "/proc/self/fd/" + std::to_string(file.get());
  owned_fd_ = ::open(same_file.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  direct_fd_.store(owned_fd_);
#endif
}

DirectFile::~DirectFile() {
  if (owned_fd_ >= 0) ::close(owned_fd_);
}

bool DirectFile::read_direct(std::uint64_t begin, std::uint64_t end, std::byte* target) const {
  std::uint64_t position = begin;
  while (position < end) {
    const auto count = static_cast<std::size_t>(align_up(end) - position);
    const ssize_t got = ::pread(direct_fd_.load(std::memory_order_relaxed),
                                target + (position - begin), count, static_cast<off_t>(position));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EINVAL) return false;  // this file system wants something else
    if (got < 0) {
      throw FileError(message(file_.path().string(), ": reading at offset ", position,
                              " failed: ", std::system_category().message(errno)));
    }
    const std::uint64_t reached = position + static_cast<std::uint64_t>(got);
    if (reached >= end) return true;
    const std::uint64_t next = align_down(reached);
    if (next <= position) {
      throw FileError(message(file_.path().string(), ": ends at offset ", reached, ", expected ",
                              file_.size(),
                              " bytes: the file shrank while the model was in use; restore it and "
                              "load the model again"));
    }
    position = next;
  }
  return true;
}

std::uint64_t DirectFile::whole_sectors(std::uint64_t offset, std::size_t bytes) {
  return align_up(offset + bytes) - align_down(offset);
}

DirectFile::Read DirectFile::read(std::uint64_t offset, std::size_t bytes,
                                  HostMemory& scratch) const {
  const std::uint64_t begin = align_down(offset);
  const std::uint64_t end = offset + bytes;
  const auto room = static_cast<std::size_t>(whole_sectors(offset, bytes));
  if (scratch.size() < room) scratch = HostMemory(room, "reading experts", PageSize::small);
  Read result;
  if (is_direct() && read_direct(begin, end, scratch.data())) {
    result = {{scratch.data() + (offset - begin), bytes}, room};
  } else {
    direct_fd_.store(-1, std::memory_order_relaxed);
    file_.read_at(offset, {scratch.data(), bytes});
#if defined(POSIX_FADV_DONTNEED)
    ::posix_fadvise(file_.get(), static_cast<off_t>(begin), static_cast<off_t>(room),
                    POSIX_FADV_DONTNEED);
#endif
    result = {{scratch.data(), bytes}, bytes};
  }
  // After the read: what was written before it is noticed, what is written later does no harm.
  file_.check_unchanged();
  return result;
}

}  // namespace moerun
