// A thread that does one thing at a time for another one.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace moerun {

class BackgroundTask {
 public:
  // Throws OutOfMemory where the system refuses a thread.
  BackgroundTask();
  // Waits for what is under way.
  ~BackgroundTask();
  BackgroundTask(const BackgroundTask&) = delete;
  BackgroundTask& operator=(const BackgroundTask&) = delete;

  // After wait(), or for the first time. What `work` refers to must live until then.
  void start(std::function<void()> work);
  // Until it is done; at once if there is nothing to do. Throws what it threw, once.
  void wait();

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> work_;  // empty: nothing to do
  bool is_stopping_ = false;
  std::exception_ptr failure_;
  std::thread thread_;
};

}  // namespace moerun
