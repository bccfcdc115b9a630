#include "base/host_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace moerun {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Number after `key` in a file of lines "key number"; without a key, the file's only number.
bool read_number(const std::string& path, std::string_view key, std::size_t& number) {
  std::ifstream file(path);
  if (key.empty()) return static_cast<bool>(file >> number);  // "max" does not parse: no limit
  std::string found;
  while (file >> found >> number) {
    if (found == key) return true;
  }
  return false;
}

// Where the limits of this process may stand: its own groups, by version 2 and version 1, and the
// root of what a container sees.
std::vector<std::string> cgroup_folders() {
  std::vector<std::string> folders = {"/sys/fs/cgroup", "/sys/fs/cgroup/memory"};
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const auto first = line.find(':');
    const auto second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (!controllers.empty() && controllers != "memory") continue;
    const std::string root = controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    // The limits of all groups above hold too.
    for (std::string group = path; group.size() > 1; group.erase(group.rfind('/'))) {
      folders.push_back(root + group);
    }
  }
  return folders;
}

// What the group may still take. Its page cache counts as used, but gives way.
std::size_t available_in_cgroup(const std::string& folder) {
  std::size_t limit = 0;
  std::size_t used = 0;
  const bool has_limit = (read_number(folder + "/memory.max", "", limit) &&
                          read_number(folder + "/memory.current", "", used)) ||
                         (read_number(folder + "/memory.limit_in_bytes", "", limit) &&
                          read_number(folder + "/memory.usage_in_bytes", "", used));
  if (!has_limit) return std::numeric_limits<std::size_t>::max();
  for (const char* kind : {"inactive_file", "active_file"}) {
    std::size_t cached = 0;
    if (read_number(folder + "/memory.stat", kind, cached)) used -= std::min(used, cached);
  }
  return limit > used ? limit - used : 0;
}

// Bytes after a key of /proc/meminfo, as much as there can be where it is not there.
std::size_t in_meminfo(std::string_view wanted) {
  std::ifstream meminfo("/proc/meminfo");
  std::string key;
  std::size_t kib = 0;
  while (meminfo >> key >> kib) {
    if (key == wanted) return kib * 1024;
    meminfo.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
  }
  return std::numeric_limits<std::size_t>::max();
}

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
  std::size_t available = in_meminfo("MemAvailable:");
  for (const std::string& folder : cgroup_folders()) {
    available = std::min(available, available_in_cgroup(folder));
  }
  return available;
}

std::size_t total_memory_bytes() { return in_meminfo("MemTotal:"); }

}  // namespace moerun
