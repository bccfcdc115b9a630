// A thread that does one thing at a time for another one. A forked process has one of its own.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>

#include "base/fork.h"
#include "base/per_process.h"

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
  // The thread, and everything that is shared with it.
  struct Worker {
    explicit Worker(std::exception_ptr failure_before);
    ~Worker();
    void run();

    std::mutex mutex;
    std::condition_variable changed;
    std::function<void()> work;   // empty: nothing to do
    std::optional<InUse> in_use;  // while there is
    bool is_stopping = false;
    std::exception_ptr failure;
    std::thread thread;
  };

  Worker& worker();

  PerProcess<Worker> worker_;
};

}  // namespace moerun
