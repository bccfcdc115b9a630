#include "runtime/runtime.h"

#include <cuda_runtime.h>

#include "device/device_messages.h"
#include "runtime/check.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

cudaStream_t stream_of(StreamHandle handle) { return static_cast<cudaStream_t>(handle.value); }
cudaEvent_t event_of(void* value) { return static_cast<cudaEvent_t>(value); }

}  // namespace

void use_device(int device) { check(cudaSetDevice(device), "making a CUDA context on the device"); }

MemoryState device_memory() {
  MemoryState memory;
  check(cudaMemGetInfo(&memory.free_bytes, &memory.total_bytes), "asking for free memory");
  return memory;
}

DeviceStream::DeviceStream(Priority priority) {
  int lowest = 0;
  int highest = 0;
  check(cudaDeviceGetStreamPriorityRange(&lowest, &highest), "asking for stream priorities");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking,
                                     priority == Priority::high ? highest : lowest),
        "making a stream");
  handle_.value = stream;
}

DeviceStream::~DeviceStream() {
  // A failure has been, or will be, reported by a call that can throw.
  (void)cudaStreamSynchronize(stream_of(handle_));
  (void)cudaStreamDestroy(stream_of(handle_));
}

void DeviceStream::synchronize() {
  check(cudaStreamSynchronize(stream_of(handle_)), "waiting for a stream");
}

DeviceEvent::DeviceEvent() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  value_ = event;
}

DeviceEvent::~DeviceEvent() { (void)cudaEventDestroy(event_of(value_)); }

void DeviceEvent::record(StreamHandle stream) {
  check(cudaEventRecord(event_of(value_), stream_of(stream)), "recording an event");
}

void DeviceEvent::make_wait(StreamHandle stream) const {
  check(cudaStreamWaitEvent(stream_of(stream), event_of(value_), 0), "waiting for an event");
}

bool DeviceEvent::is_done() const {
  const cudaError_t error = cudaEventQuery(event_of(value_));
  if (error == cudaErrorNotReady) return false;
  check(error, "asking for an event");
  return true;
}

void DeviceEvent::synchronize() const {
  check(cudaEventSynchronize(event_of(value_)), "waiting for an event");
}

DeviceMemory::DeviceMemory(std::size_t bytes, std::string_view what, Place place)
    : size_(bytes), place_(place) {
  if (bytes == 0) return;
  void* memory = nullptr;
  const bool is_pinned = place == Place::pinned_host;
  const cudaError_t error =
      is_pinned ? cudaHostAlloc(&memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable)
                : cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    if (is_pinned) throw out_of_pinned_memory(what, bytes);
    throw out_of_device_memory(what, bytes, device_memory());
  }
  check(error, "allocating memory");
  data_ = static_cast<std::byte*>(memory);
}

DeviceMemory::~DeviceMemory() {
  if (data_ == nullptr) return;
  if (place_ == Place::pinned_host) {
    (void)cudaFreeHost(data_);
  } else {
    (void)cudaFree(data_);
  }
}

void copy_async(StreamHandle stream, std::byte* destination, const std::byte* source,
                std::size_t bytes) {
  check(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, stream_of(stream)),
        "copying");
}

void wait_for_flag(StreamHandle stream, const std::uint32_t* flag, std::uint32_t value) {
  constexpr unsigned kLooksBetweenQueries = 1 << 14;  // some 100 us
  const auto is_set = [&] { return __atomic_load_n(flag, __ATOMIC_ACQUIRE) == value; };
  for (unsigned looks = 1; !is_set(); ++looks) {
    if (looks % kLooksBetweenQueries != 0) continue;
    const cudaError_t error = cudaStreamQuery(stream_of(stream));
    if (error == cudaErrorNotReady) continue;
    check(error, "waiting for the experts that a router chose");
    if (!is_set()) throw DeviceError("a stream came to its end without the flag it was to set");
  }
}

DeviceGraph::DeviceGraph(StreamHandle stream) : stream_(stream) {
  check(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal),
        "recording a graph");
}

DeviceGraph::~DeviceGraph() {
  if (is_recording_) {
    cudaGraph_t unfinished = nullptr;
    (void)cudaStreamEndCapture(stream_of(stream_), &unfinished);
    if (unfinished != nullptr) (void)cudaGraphDestroy(unfinished);
    (void)cudaGetLastError();  // that the recording was cut off is not an error of what comes next
  }
  if (graph_ != nullptr) (void)cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
}

void DeviceGraph::finish() {
  is_recording_ = false;
  cudaGraph_t recorded = nullptr;
  check(cudaStreamEndCapture(stream_of(stream_), &recorded), "recording a graph");
  cudaGraphExec_t instance = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&instance, recorded, 0);
  (void)cudaGraphDestroy(recorded);
  check(error, "making a graph");
  graph_ = instance;
}

void DeviceGraph::launch() {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), stream_of(stream_)),
        "launching a graph");
}

void fill_with_zeros(const DeviceMemory& memory) {
  if (memory.size() == 0) return;
  // Waiting for the whole device would break what another thread records.
  DeviceStream stream;
  check(cudaMemsetAsync(memory.data(), 0, memory.size(), stream_of(stream.handle())),
        "filling memory");
  stream.synchronize();
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
