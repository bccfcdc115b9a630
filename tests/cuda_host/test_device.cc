// Work of the host's device runs in any order that streams and events allow, and in no other.
#include <vector>

#include "base/error.h"
#include "check.h"
#include "kernels/intrinsics.h"
#include "kernels/launch.h"

namespace moerun::test {
namespace {

using namespace moerun::cuda;
using cuda_host::Order;

struct AddOne {
  float* numbers;
};
MOERUN_KERNEL add_one(AddOne arguments) { arguments.numbers[thread_x()] += 1; }

class TestDevice {
 public:
  TestDevice()
      : compute(cuda_host::make_stream()),
        copies(cuda_host::make_stream()),
        ready(cuda_host::make_event()),
        numbers(static_cast<float*>(cuda_host::allocate(32 * sizeof(float), "numbers"))) {}
  ~TestDevice() {
    cuda_host::free_memory(numbers);
    cuda_host::destroy_event(ready);
    cuda_host::destroy_stream(copies);
    cuda_host::destroy_stream(compute);
  }

  // Copies ones, adds one, copies back.
  std::vector<float> run() {
    const std::vector<float> ones(32, 1);
    std::vector<float> result(32);
    cuda_host::issue_copy(copies, numbers, ones.data(), 32 * sizeof(float));
    cuda_host::record_event(copies, ready);
    cuda_host::wait_for_event(compute, ready);
    launch<add_one>({compute}, {}, AddOne{numbers}, "add_one");
    cuda_host::issue_copy(compute, result.data(), numbers, 32 * sizeof(float));
    cuda_host::synchronize_stream(compute);
    cuda_host::synchronize_device();
    return result;
  }

  void* compute;
  void* copies;
  void* ready;
  float* numbers;
};

}  // namespace

TEST("a stream that waits for an event sees what was copied before it") {
  for (const Order order : {Order::late_copies, Order::random}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      cuda_host::set_order(order, seed);
      TestDevice device;
      CHECK(device.run() == std::vector<float>(32, 2));
    }
  }
}

TEST("a stream that does not wait computes with what is not there yet") {
  cuda_host::set_order(Order::late_copies, 0);
  TestDevice device;
  cuda_host::forget_waits(1);
  const auto result = device.run();
  cuda_host::forget_waits(0);
  CHECK(result[0] != 2);
}

TEST("memory has a limit, and what is written outside of it is noticed") {
  cuda_host::set_memory_limit(cuda_host::bytes_allocated() + 1000);
  CHECK_THROWS(OutOfMemory, cuda_host::allocate(1001, "a tensor"), "a tensor", "1001", "1000");
  cuda_host::set_memory_limit(SIZE_MAX);
  auto* memory = static_cast<char*>(cuda_host::allocate(10, "ten bytes"));
  memory[10] = 0;
  CHECK_THROWS(DeviceError, cuda_host::free_memory(memory), "outside of ten bytes");
  CHECK_THROWS(DeviceError, cuda_host::free_memory(memory), "not allocated");
}

TEST("work that waits for an event nobody records is reported") {
  void* stream = cuda_host::make_stream();
  void* other = cuda_host::make_stream();
  void* event = cuda_host::make_event();
  bool is_done = false;
  CHECK_THROWS(DeviceError, cuda_host::run_until([&] { return is_done; }), "nobody will record");
  cuda_host::record_event(other, event);
  cuda_host::wait_for_event(stream, event);
  cuda_host::synchronize_stream(stream);
  CHECK(cuda_host::is_event_done(event));
  cuda_host::destroy_event(event);
  cuda_host::destroy_stream(other);
  cuda_host::destroy_stream(stream);
}

TEST("a kernel that needs more shared memory than a block can have is refused, by name and size") {
  TestDevice device;
  launch<add_one>({device.compute}, {.shared_bytes = cuda_host::kMaxSharedBytes},
                  AddOne{device.numbers}, "add_one");
  CHECK_THROWS(DeviceError,
               launch<add_one>({device.compute}, {.shared_bytes = 163 * 1024 + 16},
                               AddOne{device.numbers}, "add_much"),
               "add_much", "166928", "166912");
  CHECK(device.run() == std::vector<float>(32, 2));  // nothing was issued, the device is well
}

}  // namespace moerun::test
