// Metrics of routing as functions of arrays.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "base/error.h"
#include "bindings.h"
#include "metrics/srp.h"
#include "metrics/stack_replay.h"

namespace moerun::python {
namespace {

using Ids = py::array_t<std::uint16_t, py::array::c_style>;

RoutingView view_of(const Ids& ids, std::size_t num_experts) {
  if (ids.ndim() != 2) {
    throw InvalidArgument("expert_ids: expected an array of shape (tokens, slots)");
  }
  return {{ids.data(), static_cast<std::size_t>(ids.size())},
          static_cast<std::size_t>(ids.shape(1)),
          num_experts};
}

py::array_t<std::uint64_t> activation_counts(const Ids& ids, std::size_t num_experts,
                                             std::size_t segment_length) {
  const RoutingView view = view_of(ids, num_experts);
  ActivationCounts counts(num_experts, segment_length);
  {
    const py::gil_scoped_release release;
    counts.add(view);
  }
  py::array_t<std::uint64_t> result(
      {static_cast<py::ssize_t>(num_experts), static_cast<py::ssize_t>(segment_length + 1)});
  for (std::size_t expert = 0; expert < num_experts; ++expert) {
    const auto row = counts.of_expert(expert);
    std::copy(row.begin(), row.end(),
              result.mutable_data(static_cast<py::ssize_t>(expert), py::ssize_t{0}));
  }
  return result;
}

py::dict srp(const py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>& counts) {
  if (counts.ndim() != 1 || counts.size() < 2) {
    throw InvalidArgument("histogram: expected an array of segment_length + 1 numbers");
  }
  const Srp found = srp_of({counts.data(), static_cast<std::size_t>(counts.size())});
  py::dict result;
  result["srp"] = found.srp;
  result["threshold"] = found.threshold;
  result["cache_ratio"] = found.cache_ratio;
  result["activation_rate"] = found.activation_rate;
  return result;
}

py::array_t<std::uint64_t> hits(const Ids& ids, std::size_t num_experts, const std::string& policy,
                                std::size_t segment_length) {
  const RoutingView view = view_of(ids, num_experts);
  const ReplayPolicy parsed = parse_replay_policy(policy);
  std::vector<std::uint64_t> found;
  {
    const py::gil_scoped_release release;
    found = hits_by_capacity(view, parsed, segment_length);
  }
  return py::array_t<std::uint64_t>(static_cast<py::ssize_t>(found.size()), found.data());
}

}  // namespace

void register_metrics(py::module_& module) {
  module.def("activation_counts", &activation_counts, py::arg("expert_ids"), py::arg("num_experts"),
             py::arg("segment_length"));
  module.def("srp", &srp, py::arg("histogram"));
  module.def("hits_by_capacity", &hits, py::arg("expert_ids"), py::arg("num_experts"),
             py::arg("policy"), py::arg("segment_length") = 16);
}

}  // namespace moerun::python
