// Something has moved on: what one thread waits for and others announce.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace moerun {

class Progress {
 public:
  // Take it before looking at the state, and hand it to wait_beyond if that was not good enough.
  std::uint64_t now() const {
    const std::lock_guard lock(mutex_);
    return count_;
  }
  void announce() {
    {
      const std::lock_guard lock(mutex_);
      ++count_;
    }
    changed_.notify_all();
  }
  void wait_beyond(std::uint64_t seen) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return count_ != seen; });
  }
  // The same for at most so long; false: nothing has changed.
  bool wait_beyond(std::uint64_t seen, std::chrono::microseconds most) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, most, [&] { return count_ != seen; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t count_ = 0;
};

}  // namespace moerun
