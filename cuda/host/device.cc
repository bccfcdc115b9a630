#include "host/device.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"

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
};

struct Device {
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::unique_ptr<Event>> events;
  std::map<void*, Allocation> allocations;
  Pool device_memory;
  Pool page_locked_memory;
  Order order = Order::late_copies;
  std::mt19937_64 random{1};
  bool are_waits_broken = false;
  std::exception_ptr failure;
};

Device& device() {
  static Device one;
  return one;
}

Pool& pool_of(Place place) {
  return place == Place::device ? device().device_memory : device().page_locked_memory;
}

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

void run_while(const std::function<bool()>& is_left) {
  while (is_left()) {
    if (!run_one(device())) {
      throw DeviceError("the work of the device waits for events that nobody will record");
    }
  }
}

Stream& stream_of(void* handle) { return *static_cast<Stream*>(handle); }

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
  device().order = order;
  device().random.seed(seed);
}

void* make_stream() {
  device().streams.push_back(std::make_unique<Stream>());
  return device().streams.back().get();
}

void destroy_stream(void* stream) {
  if (!device().failure) synchronize_stream(stream);
  erase(device().streams, stream);
}

void* make_event() {
  device().events.push_back(std::make_unique<Event>());
  return device().events.back().get();
}

void destroy_event(void* event) { erase(device().events, event); }

void* allocate(std::size_t bytes, const char* what, Place place) {
  Device& all = device();
  Pool& pool = pool_of(place);
  const std::size_t num_free = pool.limit - std::min(pool.limit, pool.bytes);
  if (bytes > num_free) {
    throw OutOfMemory(message(what, ": ", bytes, " bytes were asked for, ", num_free, " are free"));
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
  if (memory == nullptr) return;
  Device& all = device();
  if (!all.failure) synchronize_device();
  const auto found = all.allocations.find(memory);
  if (found == all.allocations.end()) throw DeviceError("memory was freed that is not allocated");
  const Allocation allocation = std::move(found->second);
  all.allocations.erase(found);
  pool_of(allocation.place).bytes -= allocation.bytes;
  check_red_zones(allocation);
}

std::size_t bytes_allocated(Place place) { return pool_of(place).bytes; }
void spoil(std::exception_ptr failure) {
  if (!device().failure) device().failure = std::move(failure);
}
void set_memory_limit(std::size_t bytes, Place place) { pool_of(place).limit = bytes; }

void issue_kernel(void* stream, const Grid& grid, std::function<void()> kernel, const char* name) {
  const std::uint64_t seed = device().random();
  stream_of(stream).work.push_back({Kind::kernel, [grid, seed, kernel = std::move(kernel), name] {
                                      try {
                                        run_grid(grid, seed, kernel);
                                      } catch (const std::exception& error) {
                                        throw DeviceError(message(name, ": ", error.what()));
                                      }
                                    }});
}

void issue_copy(void* stream, void* destination, const void* source, std::size_t bytes) {
  stream_of(stream).work.push_back({Kind::copy, [=] { std::memcpy(destination, source, bytes); }});
}

void record_event(void* stream, void* event) {
  auto* recorded = static_cast<Event*>(event);
  stream_of(stream).work.push_back({Kind::record, {}, recorded, ++recorded->num_recorded});
}

void wait_for_event(void* stream, void* event) {
  if (device().are_waits_broken) return;
  auto* awaited = static_cast<Event*>(event);
  stream_of(stream).work.push_back({Kind::wait, {}, awaited, awaited->num_recorded});
}

void synchronize_stream(void* stream) {
  run_while([&] { return !stream_of(stream).work.empty(); });
}

void synchronize_event(void* event) {
  const auto* awaited = static_cast<const Event*>(event);
  const std::uint64_t number = awaited->num_recorded;
  run_while([&] { return awaited->num_reached < number; });
}

void synchronize_device() {
  run_while([] {
    const auto& streams = device().streams;
    return std::any_of(streams.begin(), streams.end(),
                       [](const auto& stream) { return !stream->work.empty(); });
  });
}

void run_until(const std::function<bool()>& is_done) {
  run_while([&] { return !is_done(); });
}

bool is_event_done(void* event) {
  const auto* awaited = static_cast<const Event*>(event);
  if (awaited->num_reached < awaited->num_recorded) run_one(device());
  return awaited->num_reached >= awaited->num_recorded;
}

void set_broken_waits(bool broken) { device().are_waits_broken = broken; }

}  // namespace moerun::cuda_host
