#include "base/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>

#include "base/error.h"

namespace moerun {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

HostMemory::HostMemory(std::size_t bytes, std::string_view what, PageSize pages) {
  if (bytes == 0) return;
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) {
    throw OutOfMemory(
        message("cannot get ", bytes, " bytes of memory for ", what, ": ", std::strerror(errno)));
  }
  data_ = static_cast<std::byte*>(address);
  size_ = bytes;
  // Streaming weights through 4 KiB pages costs a page walk every 4 KiB. Advice only: a system
  // without huge pages still works.
  if (pages == PageSize::huge && bytes >= kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
}

HostMemory::~HostMemory() {
  if (data_ != nullptr) munmap(data_, size_);
}

std::size_t available_memory_bytes() {
  std::size_t available = std::numeric_limits<std::size_t>::max();
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::size_t kib = 0;
  while (meminfo >> key >> kib) {
    if (key == "MemAvailable:") available = kib * 1024;
    meminfo.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  std::ifstream limit_file("/sys/fs/cgroup/memory.max");
  std::ifstream usage_file("/sys/fs/cgroup/memory.current");
  std::size_t limit = 0;
  std::size_t usage = 0;
  if (limit_file >> limit && usage_file >> usage) {  // "max" does not parse: no limit
    available = std::min(available, limit > usage ? limit - usage : 0);
  }
  return available;
}

}  // namespace moerun
