#include "base/background_task.h"

#include <system_error>
#include <utility>

#include "base/error.h"

namespace moerun {

BackgroundTask::Worker::Worker(std::exception_ptr failure_before)
    : failure(std::move(failure_before)) {
  try {
    thread = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    throw OutOfMemory(message("the system refused a thread: ", error.what()));
  }
}

BackgroundTask::Worker::~Worker() {
  {
    const std::lock_guard lock(mutex);
    is_stopping = true;
  }
  changed.notify_all();
  thread.join();
}

BackgroundTask::BackgroundTask() : worker_(std::make_unique<Worker>(nullptr)) {}

BackgroundTask::~BackgroundTask() = default;

// Where a fork leaves the task usable, it had nothing to do.
BackgroundTask::Worker& BackgroundTask::worker() {
  return worker_.get(
      [](const Worker& parents) { return std::make_unique<Worker>(parents.failure); });
}

void BackgroundTask::start(std::function<void()> work) {
  Worker& own = worker();
  {
    const std::lock_guard lock(own.mutex);
    own.work = std::move(work);
    own.in_use.emplace(InUse::Kind::background);
  }
  own.changed.notify_all();
}

void BackgroundTask::wait() {
  Worker& own = worker();
  std::unique_lock lock(own.mutex);
  own.changed.wait(lock, [&] { return !own.work; });
  if (own.failure) std::rethrow_exception(std::exchange(own.failure, nullptr));
}

void BackgroundTask::Worker::run() {
  std::unique_lock lock(mutex);
  for (;;) {
    changed.wait(lock, [this] { return work || is_stopping; });
    if (!work) return;
    lock.unlock();
    std::exception_ptr thrown;
    try {
      work();
    } catch (...) {
      thrown = std::current_exception();
    }
    lock.lock();
    work = nullptr;
    failure = thrown;
    in_use.reset();
    changed.notify_all();
  }
}

}  // namespace moerun
