// The arrays of a trace as C++ sees them, and results of computing with them.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/thread_pool.h"
#include "bindings.h"
#include "metrics/trace_view.h"

namespace moerun::python {

using Lengths = py::array_t<std::int32_t, py::array::c_style>;
using Shape = std::vector<std::size_t>;

class TraceArrays {
 public:
  // InvalidArgument for arrays that check_trace refuses.
  TraceArrays(const py::array& expert_ids, Lengths lengths, std::size_t num_experts);

  const TraceView& view() const { return view_; }

 private:
  py::array ids_;
  Lengths lengths_;
  TraceView view_;
};

// InvalidArgument below 1.
int checked_threads(int threads);

template <typename Number>
py::array_t<Number> shaped(const std::vector<Number>& numbers, const Shape& shape) {
  std::vector<py::ssize_t> axes;
  for (const std::size_t size : shape) axes.push_back(static_cast<py::ssize_t>(size));
  py::array_t<Number> result(axes);
  std::copy(numbers.begin(), numbers.end(), result.mutable_data());
  return result;
}

// Runs compute(view, pool) without the GIL and gives its numbers the shape that it should have.
template <typename Compute>
auto computed(const TraceArrays& arrays, int threads, const Shape& shape, const Compute& compute) {
  std::invoke_result_t<Compute, const TraceView&, ThreadPool&> numbers;
  {
    const py::gil_scoped_release release;
    ThreadPool pool(checked_threads(threads));
    numbers = compute(arrays.view(), pool);
  }
  return shaped(numbers, shape);
}

}  // namespace moerun::python
