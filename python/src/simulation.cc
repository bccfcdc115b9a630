// The simulator on arrays of recorded routing; moerun.simulation is its documented face.
#include "replay/simulator.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "expert/record_file.h"
#include "model/batch_report.h"
#include "model/cache_report.h"
#include "python_model.h"
#include "replay/move_sizes.h"
#include "trace/event_log.h"

namespace moerun::python {
namespace {

using Ids = py::array_t<std::uint16_t, py::array::c_style>;
using TokenIds = py::array_t<std::int32_t, py::array::c_style>;

// How sequences are batched, as Python passes it.
struct Batching {
  std::size_t batch_size = 0;
  std::string schedule;
  std::string predictor;
  std::string model_id;
  std::string tokenizer_hash;
};

// The model that the trace says it is of; what it does not know is not there.
struct TraceModel {
  std::optional<std::size_t> num_experts;
  std::optional<std::size_t> top_k;
  std::optional<std::vector<std::size_t>> moe_layers;
};

std::string text_of(const std::vector<std::size_t>& numbers) {
  std::ostringstream text;
  for (const std::size_t number : numbers) text << (text.tellp() == 0 ? "" : ", ") << number;
  return text.str();
}

void check_same_model(const ModelPlan& plan, const TraceModel& trace) {
  std::vector<std::size_t> layers;
  for (std::size_t i = 0; i < plan.weights->layers.size(); ++i) {
    if (plan.weights->layers[i].experts.num_experts != 0) layers.push_back(i);
  }
  const auto refuse = [](const char* what, const std::string& of_model,
                         const std::string& of_trace) {
    throw InvalidArgument(message("the trace is of another model: the model has ", what, " ",
                                  of_model, ", the trace ", of_trace));
  };
  const auto experts = static_cast<std::size_t>(plan.config.num_experts);
  const auto top_k = static_cast<std::size_t>(plan.config.top_k);
  if (trace.num_experts && *trace.num_experts != experts) {
    refuse("num_experts =", std::to_string(experts), std::to_string(*trace.num_experts));
  }
  if (trace.top_k && *trace.top_k != top_k) {
    refuse("top_k =", std::to_string(top_k), std::to_string(*trace.top_k));
  }
  if (trace.moe_layers && *trace.moe_layers != layers) {
    refuse("the layers with experts", text_of(layers), text_of(*trace.moe_layers));
  }
}

bool reads_directly(const std::filesystem::path& path) {
  const FileDescriptor file = open_regular_file(path);
  return DirectFile(file).is_direct();
}

std::unique_ptr<PieceSizes> pieces_of(const ModelPlan& plan, const std::string& path,
                                      const std::string& pack_folder) {
  if (pack_folder.empty()) return std::make_unique<CheckpointStore>(*plan.weights);
  RecordFileLayout layout(*plan.weights, path);
  const auto file = layout.path_in(pack_folder);
  // Where it has not been written, most file systems would allow it.
  const bool is_direct = !std::filesystem::exists(file) || reads_directly(file);
  return std::make_unique<RecordPieces>(*plan.weights, std::move(layout), is_direct);
}

std::vector<SimSequence> sequences_of(const std::vector<Ids>& expert_ids,
                                      const std::optional<std::vector<Ids>>& prefetch_ids,
                                      const std::optional<std::vector<TokenIds>>& token_ids,
                                      std::size_t prompt_tokens) {
  const auto ids_of = [](const Ids& ids) {
    if (ids.ndim() != 3) {
      throw InvalidArgument(
          message("expert_ids: expected the shape (layers, tokens, top_k) of each "
                  "sequence, found ",
                  ids.ndim(), " dimensions"));
    }
    return std::span(ids.data(), static_cast<std::size_t>(ids.size()));
  };
  if (prefetch_ids && prefetch_ids->size() != expert_ids.size()) {
    throw InvalidArgument(message("prefetch_ids: expected those of ", expert_ids.size(),
                                  " sequences, found ", prefetch_ids->size()));
  }
  if (token_ids && token_ids->size() != expert_ids.size()) {
    throw InvalidArgument(message("token_ids: expected those of ", expert_ids.size(),
                                  " sequences, found ", token_ids->size()));
  }
  std::vector<SimSequence> sequences;
  for (std::size_t i = 0; i < expert_ids.size(); ++i) {
    SimSequence sequence;
    sequence.expert_ids = ids_of(expert_ids[i]);
    sequence.num_tokens = static_cast<std::size_t>(expert_ids[i].shape(1));
    sequence.prompt_tokens = prompt_tokens;
    if (prefetch_ids) sequence.prefetch_ids = ids_of((*prefetch_ids)[i]);
    if (token_ids) {
      const TokenIds& ids = (*token_ids)[i];
      sequence.token_ids = std::span(ids.data(), static_cast<std::size_t>(ids.size()));
    }
    sequences.push_back(sequence);
  }
  return sequences;
}

py::array_t<double> array_of(const std::vector<double>& numbers) {
  return py::array_t<double>(static_cast<py::ssize_t>(numbers.size()), numbers.data());
}

// Of a batch, all but the KV caches, which nobody simulates.
std::string batch_text(const std::optional<BatchStats>& batch) {
  if (!batch) return "null";
  auto json = batch_json(*batch);
  json.erase("kv_cache");
  return json.dump();
}

py::dict run(const std::string& path, const std::vector<SimSequence>& sequences,
             const TraceModel& trace, const Batching& batching, const SimCosts& costs, bool belady,
             const py::kwargs& kwargs) {
  ModelOptions model_options = options_from(kwargs);
  model_options.device = "cpu";
  EventLog log;
  std::string cache;
  std::string batch;
  SimResult result;
  {
    const py::gil_scoped_release release;
    const ModelPlan plan = plan_model(path, model_options);
    check_same_model(plan, trace);
    SimOptions options;
    options.cache = model_options.experts;
    options.is_belady = belady;
    options.prefill_chunk =
        std::min(static_cast<std::size_t>(model_options.prefill_chunk), plan.context_length);
    options.batch_size = batching.batch_size;
    options.schedule = schedule_mode_from(batching.schedule);
    options.predictor = batching.predictor;
    options.expected =
        expected_model(plan.config, *plan.weights, batching.model_id, batching.tokenizer_hash);
    options.sink = options.cache.log_events ? &log : nullptr;
    options.between_layers = signal_checker();
    const auto pieces = pieces_of(plan, path, model_options.experts.pack_folder);
    CacheLayout layout = plan.layout();
    result = simulate(*plan.weights, layout, static_cast<std::size_t>(plan.config.top_k), *pieces,
                      costs, sequences, options);
    layout.prefetch = result.prefetch;
    if (belady) layout.policy = "belady";
    cache = cache_json(layout, result.stats, result.window, plan.weights->expert_bytes()).dump();
    batch = batch_text(result.batch);
  }
  py::dict dict;
  dict["cache"] = from_json(cache);
  dict["batch"] = from_json(batch);
  dict["ttft_s"] = array_of(result.ttft_s);
  dict["token_s"] = array_of(result.token_s);
  dict["moved_bytes"] = result.moved_bytes;
  dict["seconds"] = result.seconds;
  dict["events"] = as_list(log.take());
  return dict;
}

// (layers, quanta + 1) each: pieces and bytes.
std::pair<py::array_t<double>, py::array_t<double>> moves_of(const std::string& path,
                                                             const py::kwargs& kwargs) {
  ModelOptions options = options_from(kwargs);
  options.device = "cpu";
  std::vector<std::vector<TransferSize>> moves;
  {
    const py::gil_scoped_release release;
    const ModelPlan plan = plan_model(path, options);
    moves = move_sizes(*plan.weights, *pieces_of(plan, path, options.experts.pack_folder));
  }
  const std::size_t columns = moves.empty() ? 0 : moves.front().size();
  py::array_t<double> pieces({moves.size(), columns});
  py::array_t<double> bytes({moves.size(), columns});
  for (std::size_t l = 0; l < moves.size(); ++l) {
    for (std::size_t q = 0; q < columns; ++q) {
      pieces.mutable_at(l, q) = moves[l][q].pieces;
      bytes.mutable_at(l, q) = moves[l][q].bytes;
    }
  }
  return {pieces, bytes};
}

}  // namespace

void register_simulation(py::module_& module) {
  module.def("move_sizes", &moves_of);
  module.def(
      "simulate",
      [](const std::string& path, const std::vector<Ids>& expert_ids,
         const std::optional<std::vector<Ids>>& prefetch_ids,
         const std::optional<std::vector<TokenIds>>& token_ids,
         std::optional<std::size_t> num_experts, std::optional<std::size_t> top_k,
         std::optional<std::vector<std::size_t>> moe_layers, std::size_t prompt_tokens,
         std::vector<double> attention_s, std::vector<double> moe_s, std::vector<double> prompt_s,
         double head_s, double link_fixed_s, double link_bytes_per_s, std::size_t link_channels,
         double slowdown, double wake_s, double predict_s, bool belady, std::size_t batch_size,
         std::string schedule, std::string predictor, std::string model_id,
         std::string tokenizer_hash, const py::kwargs& kwargs) {
        const SimCosts costs{std::move(attention_s),
                             std::move(moe_s),
                             std::move(prompt_s),
                             head_s,
                             {link_fixed_s, link_bytes_per_s, link_channels},
                             slowdown,
                             wake_s,
                             predict_s};
        const Batching batching{batch_size, std::move(schedule), std::move(predictor),
                                std::move(model_id), std::move(tokenizer_hash)};
        return run(path, sequences_of(expert_ids, prefetch_ids, token_ids, prompt_tokens),
                   {num_experts, top_k, std::move(moe_layers)}, batching, costs, belady, kwargs);
      },
      py::arg("path"), py::arg("expert_ids"), py::arg("prefetch_ids"), py::arg("token_ids"),
      py::kw_only(), py::arg("num_experts"), py::arg("top_k"), py::arg("moe_layers"),
      py::arg("prompt_tokens"), py::arg("attention_s"), py::arg("moe_s"), py::arg("prompt_s"),
      py::arg("head_s"), py::arg("link_fixed_s"), py::arg("link_bytes_per_s"),
      py::arg("link_channels"), py::arg("slowdown"), py::arg("wake_s"), py::arg("predict_s"),
      py::arg("belady"), py::arg("batch_size"), py::arg("schedule"), py::arg("predictor"),
      py::arg("model_id"), py::arg("tokenizer_hash"));
}

}  // namespace moerun::python
