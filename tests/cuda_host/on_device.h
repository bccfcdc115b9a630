// Memory of the host's device with numbers in it, and rows of activations in both places.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/view.h"
#include "check.h"
#include "kernels/launch.h"

namespace moerun::test {

class TestStream {
 public:
  TestStream() : stream_(cuda_host::make_stream()) {}
  ~TestStream() { cuda_host::destroy_stream(stream_); }
  TestStream(const TestStream&) = delete;
  TestStream& operator=(const TestStream&) = delete;

  operator cuda::StreamHandle() const { return {stream_}; }
  void synchronize() { cuda_host::synchronize_stream(stream_); }

 private:
  void* stream_;
};

template <typename T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t count)
      : count_(count),
        memory_(static_cast<T*>(cuda_host::allocate(count * sizeof(T), "a test's numbers"))) {}
  explicit OnDevice(const std::vector<T>& values) : OnDevice(values.size()) {
    if (count_ != 0) std::memcpy(memory_, values.data(), count_ * sizeof(T));
  }
  ~OnDevice() { cuda_host::free_memory(memory_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* data() const { return memory_; }
  std::vector<T> values() const { return {memory_, memory_ + count_}; }

 private:
  std::size_t count_;
  T* memory_;
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
    return {device_.data() + r * pitch_, device_.data() + r * pitch_ + cols_};
  }

 private:
  std::size_t rows_;
  std::size_t cols_;
  std::size_t pitch_;
  std::vector<float> host_;
  OnDevice<float> device_;
};

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

}  // namespace moerun::test
