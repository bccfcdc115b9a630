#include "host/device.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "device/device_messages.h"

namespace moerun::cuda_host {
namespace {

constexpr std::size_t kRedZoneBytes = 4096;
constexpr std::byte kRedZone{0xc5};
constexpr std::byte kUnwritten{0x7f};  // 0x7f7f7f7f is a large number, 0x7f7f in bf16 too

struct Event {
  std::uint64_t num_recorded = 0;
  std::uint64_t num_reached = 0;
};

enum class Kind { kernel, copy, record, wait };

struct Work {
  Kind kind;
  std::function<void()> run;
  Event* event = nullptr;
  std::uint64_t number = 0;  // of the record that is made or waited for
};

struct Stream {
  std::deque<Work> work;
  std::unique_ptr<std::vector<Work>> recording;  // where work goes instead
  std::thread::id recorder;
};

struct Allocation {
  std::unique_ptr<std::byte[]> memory;
  std::size_t bytes = 0;
  std::string what;
  Place place = Place::device;
};

struct Pool {
  std::size_t bytes = 0;
  std::size_t limit = SIZE_MAX;

  MemoryState state() const { return {limit - std::min(limit, bytes), limit}; }
};

struct Device {
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Event>> events;
  std::map<void*, Allocation> allocations;
  Pool memory;
  Pool pinned;
  Order order = Order::late_copies;
  std::mt19937_64 random{1};
  std::uint64_t num_waits_to_forget = 0;
  std::uint64_t work_until_failure = 0;
  std::exception_ptr failure;

  Pool& pool(Place place) { return place == Place::device ? memory : pinned; }
};

Device& device() {
  static Device one;
  return one;
}

// One thread at a time uses the device, and runs what others have issued if it waits for that.
// Taken by every function below; some of them call others.
std::recursive_mutex device_mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

bool can_run(const Stream& stream) {
  if (stream.work.empty()) return false;
  const Work& next = stream.work.front();
  return next.kind != Kind::wait || next.event->num_reached >= next.number;
}

// Which stream goes on; null where nothing can.
Stream* choose_stream(Device& all) {
  std::vector<Stream*> ready;
  std::vector<Stream*> without_copies;
  for (const auto& stream : all.streams) {
    if (!can_run(*stream)) continue;
    ready.push_back(stream.get());
    if (stream->work.front().kind != Kind::copy) without_copies.push_back(stream.get());
  }
  if (ready.empty()) return nullptr;
  if (all.order == Order::late_copies && !without_copies.empty()) return without_copies.front();
  return ready[all.random() % ready.size()];
}

bool run_one(Device& all) {
  if (all.failure) std::rethrow_exception(all.failure);
  Stream* stream = choose_stream(all);
  if (stream == nullptr) return false;
  const Work work = std::move(stream->work.front());
  stream->work.pop_front();
  if (work.kind == Kind::record)
    work.event->num_reached = std::max(work.event->num_reached, work.number);
  if (!work.run) return true;
  try {
    work.run();
  } catch (const std::exception& error) {
    all.failure = std::make_exception_ptr(DeviceError(error.what()));
    std::rethrow_exception(all.failure);
  }
  return true;
}

void fail_if_due() {
  auto& left = device().work_until_failure;
  if (left != 0 && --left == 0) throw DeviceError("a failure that a test asked for");
}

void run_while(const std::function<bool()>& is_left) {
  while (is_left()) {
    if (!run_one(device())) {
      throw DeviceError("the work of the device waits for events that nobody will record");
    }
  }
}

Stream& stream_of(void* handle) { return *static_cast<Stream*>(handle); }

void issue(void* handle, Work work) {
  Stream& stream = stream_of(handle);
  if (stream.recording == nullptr) {
    stream.work.push_back(std::move(work));
  } else if (work.kind == Kind::kernel || work.kind == Kind::copy) {
    stream.recording->push_back(std::move(work));
  } else {
    throw DeviceError("an event was used in a stream that is being recorded");
  }
}

void check_not_recording(const Stream& stream) {
  if (stream.recording != nullptr) {
    throw DeviceError("somebody waits for a stream that is being recorded");
  }
}

void check_nothing_is_recorded() {
  for (const auto& stream : device().streams) {
    if (stream->recording != nullptr && stream->recorder == std::this_thread::get_id()) {
      throw DeviceError("memory was asked for in a recording");
    }
  }
}

template <typename Owned>
void erase(std::vector<std::unique_ptr<Owned>>& all, void* one) {
  std::erase_if(all, [one](const auto& owned) { return owned.get() == one; });
}

void check_red_zones(const Allocation& allocation) {
  const std::byte* begin = allocation.memory.get();
  const auto is_red = [](std::byte b) { return b == kRedZone; };
  if (!std::all_of(begin, begin + kRedZoneBytes, is_red) ||
      !std::all_of(begin + kRedZoneBytes + allocation.bytes,
                   begin + 2 * kRedZoneBytes + allocation.bytes, is_red)) {
    throw DeviceError("something wrote outside of " + allocation.what);
  }
}

}  // namespace

void set_order(Order order, std::uint64_t seed) {
  const Lock lock(device_mutex);
  device().order = order;
  device().random.seed(seed);
}

void* make_stream() {
  const Lock lock(device_mutex);
  device().streams.push_back(std::make_unique<Stream>());
  return device().streams.back().get();
}

void destroy_stream(void* stream) {
  const Lock lock(device_mutex);
  std::exception_ptr problem;
  try {
    if (!device().failure) synchronize_stream(stream);
  } catch (...) {
    problem = std::current_exception();
  }
  erase(device().streams, stream);
  if (problem) std::rethrow_exception(problem);
}

void* make_event() {
  const Lock lock(device_mutex);
  device().events.push_back(std::make_unique<Event>());
  return device().events.back().get();
}

void destroy_event(void* event) {
  const Lock lock(device_mutex);
  erase(device().events, event);
}

void* allocate(std::size_t bytes, const char* what, Place place) {
  const Lock lock(device_mutex);
  check_nothing_is_recorded();
  Device& all = device();
  Pool& pool = all.pool(place);
  if (bytes > pool.state().free_bytes) {
    throw place == Place::device ? out_of_device_memory(what, bytes, pool.state())
                                 : out_of_pinned_memory(what, bytes);
  }
  Allocation allocation{std::make_unique<std::byte[]>(bytes + 2 * kRedZoneBytes), bytes, what,
                        place};
  std::byte* begin = allocation.memory.get();
  std::fill_n(begin, kRedZoneBytes, kRedZone);
  std::fill_n(begin + kRedZoneBytes, bytes, kUnwritten);
  std::fill_n(begin + kRedZoneBytes + bytes, kRedZoneBytes, kRedZone);
  void* memory = begin + kRedZoneBytes;
  pool.bytes += bytes;
  all.allocations.emplace(memory, std::move(allocation));
  return memory;
}

void free_memory(void* memory) {
  const Lock lock(device_mutex);
  if (memory == nullptr) return;
  Device& all = device();
  std::exception_ptr problem;
  try {
    if (!all.failure) synchronize_device();
  } catch (...) {
    problem = std::current_exception();
  }
  const auto found = all.allocations.find(memory);
  if (found == all.allocations.end()) throw DeviceError("memory was freed that is not allocated");
  const Allocation allocation = std::move(found->second);
  all.allocations.erase(found);
  all.pool(allocation.place).bytes -= allocation.bytes;
  check_red_zones(allocation);
  if (problem) std::rethrow_exception(problem);
}

std::size_t bytes_allocated(Place place) {
  const Lock lock(device_mutex);
  return device().pool(place).bytes;
}
void spoil(std::exception_ptr failure) {
  const Lock lock(device_mutex);
  if (!device().failure) device().failure = std::move(failure);
}
void fail_after(std::uint64_t n) {
  const Lock lock(device_mutex);
  device().work_until_failure = n;
}
void reset() {
  const Lock lock(device_mutex);
  device().work_until_failure = 0;
  device().failure = nullptr;
  for (const auto& stream : device().streams) {
    stream->work.clear();
    stream->recording.reset();
  }
}
void set_memory_limit(std::size_t bytes, Place place) {
  const Lock lock(device_mutex);
  device().pool(place).limit = bytes;
}
MemoryState memory_state() {
  const Lock lock(device_mutex);
  return device().memory.state();
}

void issue_kernel(void* stream, const Grid& grid, std::function<void()> kernel, const char* name) {
  const Lock lock(device_mutex);
  const std::uint64_t seed = device().random();
  issue(stream, {Kind::kernel, [grid, seed, kernel = std::move(kernel), name] {
                   try {
                     fail_if_due();
                     run_grid(grid, seed, kernel);
                   } catch (const std::exception& error) {
                     throw DeviceError(message(name, ": ", error.what()));
                   }
                 }});
}

void issue_copy(void* stream, void* destination, const void* source, std::size_t bytes) {
  const Lock lock(device_mutex);
  issue(stream, {Kind::copy, [=] {
                   fail_if_due();
                   std::memcpy(destination, source, bytes);
                 }});
}

void record_event(void* stream, void* event) {
  const Lock lock(device_mutex);
  auto* recorded = static_cast<Event*>(event);
  issue(stream, {Kind::record, {}, recorded, recorded->num_recorded + 1});
  ++recorded->num_recorded;
}

void wait_for_event(void* stream, void* event) {
  const Lock lock(device_mutex);
  if (device().num_waits_to_forget > 0) {
    --device().num_waits_to_forget;
    return;
  }
  auto* awaited = static_cast<Event*>(event);
  issue(stream, {Kind::wait, {}, awaited, awaited->num_recorded});
}

void begin_recording(void* stream) {
  const Lock lock(device_mutex);
  check_not_recording(stream_of(stream));
  stream_of(stream).recording = std::make_unique<std::vector<Work>>();
  stream_of(stream).recorder = std::this_thread::get_id();
}

void* end_recording(void* stream) {
  const Lock lock(device_mutex);
  return stream_of(stream).recording.release();
}

void launch_graph(void* stream, const void* graph) {
  const Lock lock(device_mutex);
  for (const Work& work : *static_cast<const std::vector<Work>*>(graph)) issue(stream, work);
}

void destroy_graph(void* graph) { delete static_cast<std::vector<Work>*>(graph); }

void synchronize_stream(void* stream) {
  const Lock lock(device_mutex);
  check_not_recording(stream_of(stream));
  run_while([&] { return !stream_of(stream).work.empty(); });
}

void synchronize_event(void* event) {
  const Lock lock(device_mutex);
  const auto* awaited = static_cast<const Event*>(event);
  const std::uint64_t number = awaited->num_recorded;
  run_while([&] { return awaited->num_reached < number; });
}

void synchronize_device() {
  const Lock lock(device_mutex);
  run_while([] {
    const auto& streams = device().streams;
    return std::any_of(streams.begin(), streams.end(),
                       [](const auto& stream) { return !stream->work.empty(); });
  });
}

void run_until(const std::function<bool()>& is_done) {
  const Lock lock(device_mutex);
  run_while([&] { return !is_done(); });
}

bool is_event_done(void* event) {
  const Lock lock(device_mutex);
  const auto* awaited = static_cast<const Event*>(event);
  if (awaited->num_reached < awaited->num_recorded) run_one(device());
  return awaited->num_reached >= awaited->num_recorded;
}

void forget_waits(std::uint64_t count) {
  const Lock lock(device_mutex);
  device().num_waits_to_forget = count;
}

}  // namespace moerun::cuda_host
