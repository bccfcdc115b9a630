// What the CUDA part needs of a device, owned by objects: streams, events, memory, copies.
// Implemented in runtime.cu on the CUDA runtime, and in host/runtime.cc for tests without a card.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "base/view.h"
#include "device/memory_state.h"
#include "kernels/launch.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Makes a device the one that this thread uses: CUDA keeps a choice for each thread.
void use_device(int device);
// Of the device that this thread uses.
MemoryState device_memory();

// What may be told apart by priority.
enum class Priority { high, low };

class DeviceStream {
 public:
  explicit DeviceStream(Priority priority = Priority::high);
  ~DeviceStream();  // waits for what is left
  DeviceStream(const DeviceStream&) = delete;
  DeviceStream& operator=(const DeviceStream&) = delete;

  StreamHandle handle() const { return handle_; }
  void synchronize();

 private:
  StreamHandle handle_;
};

class DeviceEvent {
 public:
  DeviceEvent();
  ~DeviceEvent();
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  void record(StreamHandle stream);
  // What is issued to the stream later runs after what was recorded last; does not block the host.
  void make_wait(StreamHandle stream) const;
  bool is_done() const;
  void synchronize() const;

 private:
  void* value_ = nullptr;
};

// Memory of the device, or page-locked memory of the host that the device can read and write.
// Throws OutOfMemory saying what it was for, how much was asked for and how much is free.
class DeviceMemory {
 public:
  enum class Place { device, pinned_host };

  DeviceMemory() = default;
  DeviceMemory(std::size_t bytes, std::string_view what, Place place = Place::device);
  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept { swap(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    swap(other);
    return *this;
  }

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(DeviceMemory& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(place_, other.place_);
  }

  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  Place place_ = Place::device;
};

// Between any two kinds of memory. Returns at once where the host's side is page-locked; it must
// then live until the stream has come to it. From pageable memory it may have been read already or
// not.
void copy_async(StreamHandle stream, std::byte* destination, const std::byte* source,
                std::size_t bytes);

// Waits on the host until work of the stream has stored `value` in memory that both share. Throws
// DeviceError where the stream has come to its end, or failed, without.
void wait_for_flag(StreamHandle stream, const std::uint32_t* flag, std::uint32_t value);

// What is issued to a stream between its start and finish() is recorded and not run.
class DeviceGraph {
 public:
  explicit DeviceGraph(StreamHandle stream);
  ~DeviceGraph();
  DeviceGraph(const DeviceGraph&) = delete;
  DeviceGraph& operator=(const DeviceGraph&) = delete;

  void finish();
  // Issues all of it, to the stream that it was recorded on.
  void launch();

 private:
  StreamHandle stream_;
  bool is_recording_ = true;
  void* graph_ = nullptr;
};

// Fills memory of the device with zeros, and waits for it.
void fill_with_zeros(const DeviceMemory& memory);

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
