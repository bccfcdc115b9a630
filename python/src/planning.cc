// Hit rates of the live policies, and plans; moerun/planning is the documented face of both.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "device/op_params.h"
#include "plan/planner.h"
#include "replay/policy_replay.h"
#include "replay/slot_statistics.h"
#include "trace_arrays.h"

namespace moerun::python {
namespace {

using Reals = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<std::uint16_t, py::array::c_style | py::array::forcecast>;

std::span<const double> row_of(const Reals& table, std::size_t row, std::size_t size) {
  return {table.data() + row * size, size};
}

std::vector<double> table_of(const std::optional<Reals>& tables, std::size_t layer,
                             std::size_t size) {
  if (!tables) return {};
  const auto row = row_of(*tables, layer, size);
  return {row.begin(), row.end()};
}

void check_shape(const char* name, const py::array& array, const Shape& expected) {
  bool fits = static_cast<std::size_t>(array.ndim()) == expected.size();
  for (std::size_t axis = 0; fits && axis < expected.size(); ++axis) {
    fits = static_cast<std::size_t>(array.shape(static_cast<int>(axis))) == expected[axis];
  }
  if (fits) return;
  std::ostringstream axes;
  for (std::size_t axis = 0; axis < expected.size(); ++axis) {
    axes << (axis == 0 ? "" : ", ") << expected[axis];
  }
  throw InvalidArgument(message(name, ": expected an array of shape (", axes.str(), ")"));
}

// One layer: `start` in the slots at first, then the tokens (T, k).
py::array_t<std::uint64_t> policy_hits(const std::string& policy, std::size_t num_experts,
                                       const Ids& start, const py::array& tokens,
                                       const std::vector<std::size_t>& static_experts) {
  if (tokens.ndim() != 2 || start.ndim() != 1) {
    throw InvalidArgument("tokens: expected an array of shape (tokens, top_k)");
  }
  for (py::ssize_t i = 0; i < start.size(); ++i) {
    if (start.data()[i] >= num_experts) {
      throw InvalidArgument(message("start: expected experts from 0 to ", num_experts - 1,
                                    ", found ", start.data()[i]));
    }
  }
  // As a trace of one sequence and one layer, which checks the ids.
  Lengths length(1);
  length.mutable_at(0) = static_cast<std::int32_t>(tokens.shape(0));
  const TraceArrays arrays(
      tokens.attr("reshape")(1, 1, tokens.shape(0), tokens.shape(1)).cast<py::array>(), length,
      num_experts);
  PolicyParams params;
  params.static_experts = static_experts;
  PolicyReplay replay(make_cache_policy(policy, num_experts, params), num_experts);
  {
    const py::gil_scoped_release release;
    replay.fill({start.data(), static_cast<std::size_t>(start.size())});
    std::vector<std::uint16_t> memory;
    replay.decode(arrays.view().of_layer(0, 0, memory));
  }
  return shaped(replay.hits(), {num_experts + 1});
}

std::unique_ptr<Planner> make_planner(
    std::size_t num_experts, std::size_t top_k, std::size_t records, std::size_t record_bytes,
    const Reals& attention_s, const Reals& moe_s, const Reals& prompt_s, double head_s,
    double link_fixed_s, double link_bytes_per_s, std::size_t link_channels, double slowdown,
    double wake_s, const Reals& hit_rate, const Reals& correctness,
    const std::optional<Reals>& missing, const std::optional<Reals>& absent,
    const std::optional<Reals>& absent_right, const std::optional<Reals>& move_pieces,
    const std::optional<Reals>& move_bytes, double split) {
  const auto num_layers = static_cast<std::size_t>(attention_s.size());
  check_shape("attention_s", attention_s, {num_layers});
  check_shape("moe_s", moe_s, {num_layers});
  check_shape("prompt_s", prompt_s, {num_layers});
  check_shape("hit_rate", hit_rate, {num_layers, num_experts + 1});
  const std::size_t guesses =
      correctness.ndim() == 2 ? static_cast<std::size_t>(correctness.shape(1)) : 0;
  check_shape("correctness", correctness, {num_layers, guesses});
  const std::size_t num_moves = (records + kQuantumRecords - 1) / kQuantumRecords + 1;
  for (const auto& [name, moves] :
       {std::pair("move_pieces", &move_pieces), std::pair("move_bytes", &move_bytes)}) {
    if (*moves) check_shape(name, **moves, {num_layers, num_moves});
  }
  const std::size_t columns = num_experts + 1;
  if (missing) check_shape("missing", *missing, {num_layers, top_k + 1, columns});
  for (const auto& [name, table] :
       {std::pair("absent", &absent), std::pair("absent_right", &absent_right)}) {
    if (*table) check_shape(name, **table, {num_layers, guesses, columns});
  }
  PlanProblem problem;
  problem.head_s = head_s;
  problem.link = {link_fixed_s, link_bytes_per_s, link_channels, slowdown, wake_s};
  for (std::size_t l = 0; l < num_layers; ++l) {
    LayerModel layer;
    layer.num_experts = num_experts;
    layer.top_k = top_k;
    layer.records = records;
    layer.record_bytes = record_bytes;
    layer.quantum_records = kQuantumRecords;
    layer.attention_s = attention_s.data()[l];
    layer.moe_s = moe_s.data()[l];
    layer.prompt_s = prompt_s.data()[l];
    const auto rates = row_of(hit_rate, l, num_experts + 1);
    layer.hit_rate.assign(rates.begin(), rates.end());
    const auto right = row_of(correctness, l, guesses);
    layer.correctness.assign(right.begin(), right.end());
    layer.missing = table_of(missing, l, (top_k + 1) * columns);
    layer.absent = table_of(absent, l, guesses * columns);
    layer.absent_right = table_of(absent_right, l, guesses * columns);
    for (std::size_t q = 0; move_pieces && move_bytes && q < num_moves; ++q) {
      layer.moves.push_back(
          {row_of(*move_pieces, l, num_moves)[q], row_of(*move_bytes, l, num_moves)[q]});
    }
    problem.layers.push_back(std::move(layer));
  }
  set_windows(problem.layers, head_s);
  const py::gil_scoped_release release;
  return std::make_unique<Planner>(std::move(problem), split);
}

// Settings are lists of (slots, records of a top segment), one for each layer.
using Settings = std::vector<std::pair<std::size_t, std::size_t>>;

Settings to_python(const std::vector<CacheSetting>& settings) {
  Settings result;
  for (const auto& each : settings) result.emplace_back(each.num_slots, each.top_records);
  return result;
}

std::vector<CacheSetting> from_python(const Settings& settings) {
  std::vector<CacheSetting> result;
  for (const auto& [slots, records] : settings) result.push_back({slots, records});
  return result;
}

py::dict estimate(const Planner& planner, const Settings& settings) {
  const TokenEstimate found = planner.estimate(from_python(settings));
  py::dict result;
  result["seconds"] = found.seconds;
  result["exposed_s"] = found.exposed_s;
  result["hit_rate"] = found.hit_rate;
  result["bytes"] = found.bytes;
  py::list layers;
  for (const LayerEstimate& layer : found.layers) {
    py::dict entry;
    entry["hit_rate"] = layer.hit_rate;
    entry["exposed_s"] = layer.exposed_s;
    layers.append(entry);
  }
  result["layers"] = layers;
  return result;
}

// (missing (L, k + 1, E + 1), right (L, k), absent and absent_right (L, k, E + 1)), all counts.
py::tuple statistics(const TraceArrays& trace, const std::optional<Ids>& guesses,
                     const std::string& policy, const std::optional<Ids>& ranking, bool restart,
                     int threads) {
  const TraceView& view = trace.view();
  const auto ids_of = [](const std::optional<Ids>& ids) {
    return ids ? std::span(ids->data(), static_cast<std::size_t>(ids->size()))
               : std::span<const std::uint16_t>();
  };
  std::vector<SlotStatistics> found;
  {
    const auto guessed = ids_of(guesses);
    const auto ranked = ids_of(ranking);
    const py::gil_scoped_release release;
    ThreadPool pool(checked_threads(threads));
    found = slot_statistics(view, guessed, policy, ranked, restart, pool);
  }
  const auto joined = [&](std::vector<std::uint64_t> SlotStatistics::* field, const Shape& shape) {
    std::vector<std::uint64_t> all;
    for (const SlotStatistics& layer : found) {
      all.insert(all.end(), (layer.*field).begin(), (layer.*field).end());
    }
    Shape axes = {view.num_layers};
    axes.insert(axes.end(), shape.begin(), shape.end());
    return shaped(all, axes);
  };
  const std::size_t columns = view.num_experts + 1;
  return py::make_tuple(joined(&SlotStatistics::missing, {view.slots + 1, columns}),
                        joined(&SlotStatistics::right, {view.slots}),
                        joined(&SlotStatistics::absent, {view.slots, columns}),
                        joined(&SlotStatistics::absent_right, {view.slots, columns}));
}

}  // namespace

void register_planning(py::module_& module) {
  module.def("slot_statistics", &statistics);

  module.def("slot_hits", [](const TraceArrays& trace, const std::string& policy, bool restart,
                             int threads) {
    return computed(trace, threads, Shape{trace.view().num_layers, trace.view().num_experts + 1},
                    [&](const auto& t, auto& pool) { return slot_hits(t, policy, restart, pool); });
  });
  module.def("policy_hits", &policy_hits);
  // (bytes, seconds, pieces) each.
  module.def("fit_transfer", [](const std::vector<std::array<double, 3>>& samples) {
    std::vector<TransferSample> all;
    for (const auto& [bytes, seconds, pieces] : samples) all.push_back({bytes, seconds, pieces});
    const TransferCost link = fit_transfer(all);
    return std::pair(link.fixed_s, link.bytes_per_s);
  });
  py::class_<Planner>(module, "Planner")
      .def(py::init(&make_planner), py::kw_only(), py::arg("num_experts"), py::arg("top_k"),
           py::arg("records"), py::arg("record_bytes"), py::arg("attention_s"), py::arg("moe_s"),
           py::arg("prompt_s"), py::arg("head_s"), py::arg("link_fixed_s"),
           py::arg("link_bytes_per_s"), py::arg("link_channels") = std::size_t{1},
           py::arg("slowdown") = 0.0, py::arg("wake_s") = 0.0, py::arg("hit_rate"),
           py::arg("correctness"), py::arg("missing") = py::none(), py::arg("absent") = py::none(),
           py::arg("absent_right") = py::none(), py::arg("move_pieces") = py::none(),
           py::arg("move_bytes") = py::none(), py::arg("split"))
      .def("divide",
           [](const Planner& self, std::size_t bytes) {
             const py::gil_scoped_release release;
             return to_python(self.divide(bytes));
           })
      .def("uniform", [](const Planner& self, std::size_t bytes,
                         double split) { return to_python(self.uniform(bytes, split)); })
      .def("estimate", &estimate)
      .def(
          "prompt_seconds",
          [](const Planner& self, const Settings& settings, std::size_t tokens, std::size_t chunk) {
            return self.prompt_seconds(from_python(settings), tokens, chunk);
          })
      .def("bytes_of", [](const Planner& self, const Settings& settings) {
        return self.bytes_of(from_python(settings));
      });
}

}  // namespace moerun::python
