#include "model/model.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.h"
#include "bindings.h"
#include "expert/record_file.h"
#include "model/cache_report.h"
#include "model/dry_run.h"
#include "model/forward.h"
#include "model/generation.h"
#include "model/stats.h"
#include "python_model.h"
#if defined(MOERUN_CUDA_HOST)
#include "host/host_backend.h"
#endif

namespace moerun::python {
namespace {

// (expert_ids, predicted_ids), each (tokens, layers with experts, top_k).
std::shared_ptr<const RoutingReplay> routing_replay_from(const py::handle& value) {
  using Ids = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
  const auto [used, predicted] = value.cast<std::pair<Ids, Ids>>();
  if (used.ndim() != 3 || predicted.ndim() != 3 || used.shape(0) == 0) {
    throw InvalidArgument("routing_replay: expected two arrays of shape (tokens, layers, top_k)");
  }
  auto replay = std::make_shared<RoutingReplay>();
  replay->tokens = static_cast<std::size_t>(used.shape(0));
  replay->expert_ids.assign(used.data(), used.data() + used.size());
  replay->predicted_ids.assign(predicted.data(), predicted.data() + predicted.size());
  return replay;
}

}  // namespace

ModelOptions options_from(const py::kwargs& kwargs) {
  ModelOptions options;
  const auto positive = [](const char* name, std::int64_t value) {
    if (value >= 1) return value;
    throw InvalidArgument(message(name, ": expected at least 1, found ", value));
  };
  for (const auto& [key, value] : kwargs) {
    if (value.is_none()) continue;
    const auto name = key.cast<std::string>();
    if (name == "device") {
      options.device = value.cast<std::string>();
    } else if (name == "threads") {
      options.threads = static_cast<int>(positive("threads", value.cast<int>()));
    } else if (name == "context_length") {
      options.context_length = positive("context_length", value.cast<std::int64_t>());
    } else if (name == "prefill_chunk") {
      options.prefill_chunk = value.cast<std::int64_t>();
    } else if (name == "cpu_kernels") {
      options.cpu_kernels = value.cast<std::string>();
    } else if (name == "expert_budget") {
      options.experts.budget = value.cast<std::string>();
    } else if (name == "policy") {
      options.experts.policy = value.cast<std::string>();
    } else if (name == "split") {
      options.experts.split = value.cast<std::vector<double>>();
    } else if (name == "prefetch") {
      options.experts.prefetch = value.cast<std::string>();
    } else if (name == "plan") {
      options.experts.plan = value.cast<std::string>();
    } else if (name == "pack_folder") {
      options.experts.pack_folder = value.cast<std::string>();
    } else if (name == "pin_limit") {
      options.experts.pin_limit = value.cast<std::string>();
    } else if (name == "host_tier") {
      options.experts.host_tier = value.cast<std::string>();
    } else if (name == "cache_events") {
      options.experts.log_events = value.cast<bool>();
    } else if (name == "sync_times") {
      options.decoder.sync_times = value.cast<bool>();
    } else if (name == "routing_replay") {
      options.decoder.replay = routing_replay_from(value);
    } else {
      throw py::type_error(message("unexpected keyword argument '", name, "'"));
    }
  }
#if defined(MOERUN_CUDA_HOST)  // builds for tests: a device that no other build knows
  if (options.device == "cuda-host") options.make_backend = cuda_host::make_backend;
#endif
  return options;
}

py::list as_list(const std::vector<CacheEvent>& events) {
  py::list list;
  for (const CacheEvent& event : events) {
    list.append(py::make_tuple(event.token, event.layer, event.expert, name_of(event.kind)));
  }
  return list;
}

namespace {

std::unique_ptr<PythonModel> load(const std::string& path,
                                  const std::optional<py::function>& progress,
                                  const py::kwargs& kwargs) {
  const ModelOptions options = options_from(kwargs);
  const Origin origin;
  const LoadProgress report = [&](std::uint64_t done, std::uint64_t total) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) (*progress)(done, total);
    check_same_process(origin);
  };
  const py::gil_scoped_release release;
  return std::make_unique<PythonModel>(Model::load(path, options, report));
}

py::object dry_run(const std::string& path, const py::kwargs& kwargs) {
  const ModelOptions options = options_from(kwargs);
  std::string json;
  {
    const py::gil_scoped_release release;
    json = dry_run_json(path, options);
  }
  return from_json(json);
}

py::tuple forward_array(const PythonModel& self, const py::object& token_ids) {
  const auto model = self.get();
  const auto ids = token_ids_from(token_ids);
  model->check_prompt(ids);
  const auto vocab = static_cast<py::ssize_t>(model->config().vocab_size);
  py::array_t<float> logits({static_cast<py::ssize_t>(ids.size()), vocab});
  const std::span<float> target(logits.mutable_data(), static_cast<std::size_t>(logits.size()));
  std::string complaint;
  {
    const py::gil_scoped_release release;
    complaint = forward_with_non_finite(model, ids, target, signal_checker());
  }
  return py::make_tuple(std::move(logits), std::move(complaint));
}

OwnedGeneration generate(const PythonModel& self, const py::object& token_ids,
                         const py::kwargs& kwargs) {
  const auto model = self.get();
  const GenerationParams params = generation_params_from(kwargs);
  auto ids = token_ids_from(token_ids);
  const py::gil_scoped_release release;
  return OwnedGeneration(new Generation(model, std::move(ids), params));
}

py::object reconfigure(const PythonModel& self, const std::string& plan,
                       const std::string& plan_text) {
  using Clock = std::chrono::steady_clock;
  const auto model = self.get();
  std::string json;
  {
    const py::gil_scoped_release release;
    const auto begin = Clock::now();
    const Reconfiguration changes = model->reconfigure(plan, plan_text, signal_checker());
    const std::chrono::duration<double> elapsed = Clock::now() - begin;
    json = reconfiguration_json(changes, elapsed.count()).dump();
  }
  return from_json(json);
}

// Of a model with every expert in memory: all of them.
py::dict residents(const PythonModel& self) {
  const auto model = self.get();
  py::dict result;
  if (const ExpertCache* cache = model->expert_cache()) {
    const auto experts = cache->residents();
    const CacheLayout layout = cache->layout();
    for (std::size_t i = 0; i < experts.size(); ++i) {
      result[py::int_(layout.layers[i].layer)] = py::cast(experts[i]);
    }
    return result;
  }
  const auto& layers = model->weights().layers;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (layers[layer].experts.num_experts == 0) continue;
    py::list all;
    for (std::size_t id = 0; id < layers[layer].experts.num_experts; ++id) all.append(id);
    result[py::int_(layer)] = all;
  }
  return result;
}

py::dict routing_window(const PythonModel& self) {
  const auto model = self.get();
  const ExpertCache* cache = model->expert_cache();
  if (cache == nullptr) {
    throw InvalidArgument(
        "routing_window: every expert is in memory, so no cache is asked for any; load the model "
        "with a smaller expert_budget, or use trace()");
  }
  const RoutingHistory history = cache->routing_history();
  const auto layers = history.layers.size();
  const std::size_t row = history.num_tokens * history.top_k;
  py::array_t<std::uint16_t> ids({layers, history.num_tokens, history.top_k});
  py::array_t<std::uint64_t> named({layers, history.top_k});
  py::array_t<std::uint64_t> right({layers, history.top_k});
  for (std::size_t i = 0; i < layers; ++i) {
    const RoutingHistory::Layer& layer = history.layers[i];
    std::copy(layer.expert_ids.begin(), layer.expert_ids.end(), ids.mutable_data() + i * row);
    std::copy(layer.named.begin(), layer.named.end(), named.mutable_data() + i * history.top_k);
    std::copy(layer.right.begin(), layer.right.end(), right.mutable_data() + i * history.top_k);
  }
  py::dict result;
  result["expert_ids"] = ids;
  result["named"] = named;
  result["right"] = right;
  return result;
}

}  // namespace

void register_model(py::module_& module) {
  module.def(
      "remove_record_files",
      [](const std::string& path, const std::string& folder) {
        py::list removed;
        for (const RemovedFile& each : remove_record_files(path, folder)) {
          removed.append(py::make_tuple(py::bytes(each.path.native()), each.bytes));
        }
        return removed;
      },
      py::arg("path"), py::arg("folder"));
  module.def("dry_run", &dry_run, py::arg("path"));
  py::class_<PythonModel>(module, "Model")
      .def(py::init(&load), py::arg("path"), py::arg("progress") = py::none())
      .def("forward", &forward_array, py::arg("token_ids"))
      .def("generate", &generate, py::arg("token_ids"))
      .def("stats", [](const PythonModel& self) { return from_json(stats_json(*self.get())); })
      .def("decode_tokens",
           [](const PythonModel& self) {
             const auto model = self.get();
             const ExpertCache* cache = model->expert_cache();
             return cache == nullptr ? 0 : cache->decode_tokens();
           })
      .def("reconfigure", &reconfigure, py::arg("plan"), py::arg("plan_text") = "")
      .def("residents", &residents)
      .def("routing_window", &routing_window)
      .def("cache_events",
           [](const PythonModel& self) { return as_list(self.get()->cache_events()); })
      .def("take_cache_events",
           [](const PythonModel& self) { return as_list(self.get()->take_cache_events()); })
      .def("close",
           [](PythonModel& self) {
             auto last = self.take();
             const py::gil_scoped_release release;
             last.reset();
           })
      .def_property_readonly(
          "config",
          [](const PythonModel& self) { return from_json(config_json(self.get()->config())); })
      .def_property_readonly("context_length",
                             [](const PythonModel& self) { return self.get()->context_length(); })
      .def_property_readonly("device",
                             [](const PythonModel& self) { return self.get()->device(); });
}

}  // namespace moerun::python
