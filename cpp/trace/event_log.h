// Keeps cache events in memory.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "trace/cache_event.h"

namespace moerun {

class EventLog : public TraceSink {
 public:
  void record(const CacheEvent& event) override {
    const std::lock_guard lock(mutex_);
    events_.push_back(event);
  }
  std::vector<CacheEvent> copy() const {
    const std::lock_guard lock(mutex_);
    return events_;
  }
  // Returns the events since the last call, and keeps them no longer.
  std::vector<CacheEvent> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(events_, {});
  }

 private:
  mutable std::mutex mutex_;
  std::vector<CacheEvent> events_;
};

}  // namespace moerun
