// Memory of the device with numbers in it, and rows of activations in both places. The device is
// the host's, or a card where the tests are built for one (moerun_cuda_tests).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "base/view.h"
#include "check.h"
#include "device/backend.h"
#include "runtime/runtime.h"
#if defined(MOERUN_CUDA_HOST)
#include "host/device.h"
#include "host/host_backend.h"
#else
#include "device/cuda_backend.h"
#endif

namespace moerun::test {

#if defined(MOERUN_CUDA_HOST)
using cuda_host::Order;
using cuda_host::set_order;
inline std::unique_ptr<Backend> make_device_backend() { return cuda_host::make_backend(); }
#else
// A card's work runs in the order that it likes.
enum class Order { late_copies, random };
inline void set_order(Order, std::uint64_t) {}
inline std::unique_ptr<Backend> make_device_backend() { return make_cuda_backend(); }
#endif

class TestStream {
 public:
  operator cuda::StreamHandle() const { return stream_.handle(); }
  void synchronize() { stream_.synchronize(); }

 private:
  cuda::DeviceStream stream_;
};

// In memory that both sides can use: of a card, page-locked memory of the host.
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t count)
      : count_(count),
        memory_(count * sizeof(T), "a test's numbers", cuda::DeviceMemory::Place::pinned_host) {}
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    if (count_ != 0) std::memcpy(data(), values.data(), count_ * sizeof(T));
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return memory_.as<T>(); }
  std::vector<T> values() const { return {data(), data() + count_}; }

 private:
  std::size_t count_;
  cuda::DeviceMemory memory_;
};

// (rows, cols) numbers on the host, their padding zero, and on the device, theirs NaN: kernels may
// neither use nor overwrite it.
class TestRows {
 public:
  // `values`: (rows, padded(cols)).
  TestRows(std::vector<float> values, std::size_t rows, std::size_t cols)
      : rows_(rows), cols_(cols), pitch_(padded(cols)), host_(std::move(values)), device_(host_) {
    for (std::size_t r = 0; r < rows_; ++r) {
      std::fill(device_.data() + r * pitch_ + cols_, device_.data() + (r + 1) * pitch_,
                std::numeric_limits<float>::quiet_NaN());
    }
  }
  TestRows(std::size_t rows, std::size_t cols)
      : TestRows(std::vector<float>(rows * padded(cols)), rows, cols) {}

  Activations host() { return {host_.data(), rows_, cols_, pitch_}; }
  Activations device() { return {device_.data(), rows_, cols_, pitch_}; }

  // Fails unless both hold the same numbers, within `tolerance` of the largest.
  void check_same(double tolerance) const {
    double largest = 1e-30;
    for (const float value : host_) largest = std::max<double>(largest, std::fabs(value));
    for (std::size_t r = 0; r < rows_; ++r) {
      for (std::size_t c = 0; c < cols_; ++c) {
        CHECK_NEAR(device_.data()[r * pitch_ + c], host_[r * pitch_ + c], tolerance * largest);
      }
      for (std::size_t c = cols_; c < pitch_; ++c)
        CHECK(std::isnan(device_.data()[r * pitch_ + c]));
    }
  }
  // Of the device.
  std::vector<float> row(std::size_t r) const {
    std::vector<float> result(cols_);
    std::copy_n(device_.data() + r * pitch_, cols_, result.data());
    return result;
  }

 private:
  std::size_t rows_;
  std::size_t cols_;
  std::size_t pitch_;
  std::vector<float> host_;
  OnDevice<float> device_;
};

#if defined(MOERUN_CUDA_HOST)
// Fails unless `run`, which returns what a kernel computes, gives something else when the kernel's
// n-th barrier is missing, in one at least of the orders that its threads may run in.
template <typename Run>
void check_needs_barrier(int number, const Run& run) {
  const auto right = run();
  std::size_t num_wrong = 0;
  cuda_host::set_broken_barrier(number);
  for (int order = 0; order < 10 && num_wrong == 0; ++order) num_wrong += run() != right;
  cuda_host::set_broken_barrier(-1);
  if (num_wrong == 0) fail(__FILE__, __LINE__, "barrier ", number, " is not needed");
  CHECK(run() == right);
}
#endif

}  // namespace moerun::test
