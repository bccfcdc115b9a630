// Metrics of routing as functions of arrays; moerun/metrics makes tables of them.
#include "metrics/trace_metrics.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>

#include "base/error.h"
#include "bindings.h"
#include "trace_arrays.h"

namespace moerun::python {
namespace {

void register_srp(py::module_& module) {
  module.def("layer_histograms", [](const TraceArrays& trace, std::size_t m, int threads) {
    const auto& view = trace.view();
    return computed(trace, threads, Shape{view.num_sequences(), view.num_layers, m + 1},
                    [&](const auto& t, auto& pool) { return layer_histograms(t, m, pool); });
  });
  module.def("expert_histograms", [](const TraceArrays& trace, std::size_t m, int threads) {
    const auto& view = trace.view();
    return computed(trace, threads, Shape{view.num_layers, view.num_experts, m + 1},
                    [&](const auto& t, auto& pool) { return expert_histograms(t, m, pool); });
  });
  module.def("expert_histograms_by_sequence",
             [](const TraceArrays& trace, std::size_t layer, std::size_t m, int threads) {
               const auto& view = trace.view();
               if (layer >= view.num_layers) throw InvalidArgument("layer: there is none such");
               return computed(trace, threads, Shape{view.num_sequences(), view.num_experts, m + 1},
                               [&](const auto& t, auto& pool) {
                                 return expert_histograms_by_sequence(t, layer, m, pool);
                               });
             });
  // (groups, segment_length + 1) window counts to four arrays (groups).
  module.def("srp", [](const py::array_t<std::uint64_t, py::array::c_style>& histograms) {
    if (histograms.ndim() != 2 || histograms.shape(1) < 2) {
      throw InvalidArgument("histograms: expected the shape (groups, segment_length + 1)");
    }
    const auto groups = histograms.shape(0);
    const auto row = static_cast<std::size_t>(histograms.shape(1));
    py::array_t<double> srp(groups);
    py::array_t<std::int64_t> threshold(groups);
    py::array_t<double> ratio(groups);
    py::array_t<double> rate(groups);
    for (py::ssize_t i = 0; i < groups; ++i) {
      const Srp found = srp_of({histograms.data(i, 0), row});
      srp.mutable_at(i) = found.srp;
      threshold.mutable_at(i) = static_cast<std::int64_t>(found.threshold);
      ratio.mutable_at(i) = found.cache_ratio;
      rate.mutable_at(i) = found.activation_rate;
    }
    return py::make_tuple(srp, threshold, ratio, rate);
  });
}

void register_replay(py::module_& module) {
  module.def("replay_hits", [](const TraceArrays& trace, const std::string& policy, std::size_t m,
                               bool one_pool, int threads) {
    const auto& view = trace.view();
    const ReplayPolicy parsed = parse_replay_policy(policy);
    const std::size_t caches = one_pool ? 1 : view.num_layers;
    const std::size_t experts = view.num_experts * (one_pool ? view.num_layers : 1);
    return computed(
        trace, threads, Shape{view.num_sequences(), caches, experts + 1},
        [&](const auto& t, auto& pool) { return replay_hits(t, parsed, m, one_pool, pool); });
  });
}

void register_balance_and_prediction(py::module_& module) {
  module.def("num_activations", [](const TraceArrays& trace, int threads) {
    const auto& view = trace.view();
    return computed(trace, threads, Shape{view.num_sequences(), view.num_layers, view.num_experts},
                    [](const auto& t, auto& pool) { return num_activations(t, pool); });
  });
  module.def("window_deviations", [](const TraceArrays& trace, std::size_t m, int threads) {
    return computed(trace, threads, Shape{trace.view().num_sequences(), trace.view().num_layers},
                    [&](const auto& t, auto& pool) { return window_deviations(t, m, pool); });
  });
  module.def("previous_token_hits", [](const TraceArrays& trace, int threads) {
    return computed(trace, threads, Shape{trace.view().num_sequences(), trace.view().num_layers},
                    [](const auto& t, auto& pool) { return previous_token_hits(t, pool); });
  });
  module.def("layer_pairs", [](const TraceArrays& trace, int threads) {
    const auto& view = trace.view();
    return computed(trace, threads, Shape{view.num_layers - 1, view.num_experts, view.num_experts},
                    [](const auto& t, auto& pool) { return layer_pairs(t, pool); });
  });
  module.def("previous_layer_hits", [](const TraceArrays& trace,
                                       const py::array_t<float, py::array::c_style>& weights,
                                       int threads) {
    const std::span<const float> table(weights.data(), static_cast<std::size_t>(weights.size()));
    return computed(trace, threads,
                    Shape{trace.view().num_sequences(), trace.view().num_layers - 1},
                    [&](const auto& t, auto& pool) { return previous_layer_hits(t, table, pool); });
  });
}

}  // namespace

void register_metrics(py::module_& module) {
  py::class_<TraceArrays>(module, "TraceArrays")
      .def(py::init<const py::array&, Lengths, std::size_t>(), py::arg("expert_ids"),
           py::arg("lengths"), py::arg("num_experts"));
  module.def("check_expert_ids",
             [](const py::array& expert_ids, const Lengths& lengths, std::size_t num_experts) {
               const TraceArrays checked(expert_ids, lengths, num_experts);
             });
  register_srp(module);
  register_replay(module);
  register_balance_and_prediction(module);
}

}  // namespace moerun::python
