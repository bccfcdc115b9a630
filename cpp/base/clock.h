// Time, from outside: the real one, or one that moves only when it is told to.
#pragma once

#include <algorithm>
#include <chrono>

namespace moerun {

class Clock {
 public:
  virtual ~Clock() = default;
  // In seconds since some moment; never falls.
  virtual double now() const = 0;
};

class SteadyClock final : public Clock {
 public:
  double now() const override {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

// For one thread.
class VirtualClock final : public Clock {
 public:
  double now() const override { return now_; }
  void advance_to(double time) { now_ = std::max(now_, time); }
  void advance(double seconds) { advance_to(now_ + seconds); }

 private:
  double now_ = 0;
};

}  // namespace moerun
