// Copies from the host to a device, beside what the device computes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/backend.h"

namespace moerun {

// Two streams of copies, of which the urgent one goes first. For one thread.
class CopyQueue {
 public:
  enum class Lane { urgent, patient };

  // Names everything that was issued to a lane so far; 0 names nothing and is always done.
  using Mark = std::uint64_t;

  virtual ~CopyQueue() = default;

  // From now on copies overwrite memory that `compute` reads, or that copies of the other lane may
  // still write to: they begin when all of that which was issued before this call has run.
  virtual void follow(Stream& compute) = 0;
  // Issues a copy and returns. The source is page-locked and lives until the copy is done.
  virtual void copy(Lane lane, std::byte* destination, const std::byte* source,
                    std::size_t bytes) = 0;
  virtual Mark mark(Lane lane) = 0;
  virtual bool is_done(Mark mark) = 0;
  // What is issued to `compute` later runs when the copies are done; does not block the host.
  virtual void make_wait(Stream& compute, Mark mark) = 0;
  // Blocks the host until every copy is done.
  virtual void synchronize() = 0;
};

}  // namespace moerun
