// What has to be read from a checkpoint and where it goes; then all of it, by all threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "base/host_memory.h"
#include "base/thread_pool.h"
#include "io/checkpoint.h"
#include "weights/placement.h"

namespace moerun {

// Told (bytes done, bytes in all) now and then, on the thread that loads. May throw to stop.
using LoadProgress = std::function<void(std::uint64_t, std::uint64_t)>;

// Where rows of memory start, and how far apart they are.
struct RowTarget {
  std::byte* data = nullptr;
  std::size_t stride = 0;    // bytes
  DType dtype = DType::f32;  // the file's, or f32
};

class LoadPlan {
 public:
  // Row r of the file becomes row r of the target, converted to float32 if that is asked for.
  void add_rows(const FileMatrix& source, const RowTarget& target);
  // Column c of the file becomes row c of the target.
  void add_transposed(const FileMatrix& source, const RowTarget& target);

  std::uint64_t total_bytes() const { return total_bytes_; }
  void run(ThreadPool& pool, const LoadProgress& progress) const;

 private:
  struct Task {
    FileMatrix source;  // a piece of a few megabytes
    RowTarget target;
    bool transposed;
  };
  void add(const FileMatrix& source, const RowTarget& target, bool transposed);
  struct Staging {
    HostMemory file;
    HostMemory converted;
  };
  static void read(const Task& task, Staging& staging);

  std::vector<Task> tasks_;
  std::uint64_t total_bytes_ = 0;
};

}  // namespace moerun
