#include "trace_arrays.h"

#include "base/error.h"

namespace moerun::python {

TraceArrays::TraceArrays(const py::array& expert_ids, Lengths lengths, std::size_t num_experts)
    : ids_(expert_ids), lengths_(std::move(lengths)) {
  if (ids_.ndim() != 4 || (ids_.flags() & py::array::c_style) == 0 || ids_.size() == 0) {
    throw InvalidArgument(
        "expert_ids: expected a contiguous array of shape (sequences, layers, tokens, top_k) "
        "that is not empty");
  }
  const auto size = static_cast<std::size_t>(ids_.size());
  if (py::isinstance<py::array_t<std::uint8_t>>(ids_)) {
    view_.expert_ids = std::span(static_cast<const std::uint8_t*>(ids_.data()), size);
  } else if (py::isinstance<py::array_t<std::uint16_t>>(ids_)) {
    view_.expert_ids = std::span(static_cast<const std::uint16_t*>(ids_.data()), size);
  } else {
    throw InvalidArgument("expert_ids: expected uint8 or uint16");
  }
  view_.lengths = {lengths_.data(), static_cast<std::size_t>(lengths_.size())};
  view_.num_layers = static_cast<std::size_t>(ids_.shape(1));
  view_.num_tokens = static_cast<std::size_t>(ids_.shape(2));
  view_.slots = static_cast<std::size_t>(ids_.shape(3));
  view_.num_experts = num_experts;
  check_trace(view_);
}

int checked_threads(int threads) {
  if (threads >= 1) return threads;
  throw InvalidArgument(message("threads: expected at least 1, found ", threads));
}

}  // namespace moerun::python
