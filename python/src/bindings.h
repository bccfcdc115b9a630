// What the files of the Python module share; one file registers one noun.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/fork.h"
#include "model/decoder.h"
#include "model/generation.h"

namespace moerun::python {

namespace py = pybind11;

void register_errors(py::module_& module);
void register_model(py::module_& module);
void register_simulation(py::module_& module);
void register_tracing(py::module_& module);
void register_generation(py::module_& module);
void register_batch(py::module_& module);
void register_info(py::module_& module);
void register_metrics(py::module_& module);
void register_planning(py::module_& module);
void register_scheduling(py::module_& module);
void register_predictor(py::module_& module);
void register_timing(py::module_& module);

// JSON text as Python objects.
py::object from_json(const std::string& text);

// Any sequence of integers, or a one-dimensional integer array; InvalidArgument naming the first
// entry that is not one.
std::vector<std::int32_t> token_ids_from(const py::object& ids);

// Of a generation, by keyword: max_new_tokens, stop_token_ids, and all of SamplingParams.
GenerationParams generation_params_from(const py::kwargs& kwargs);

// After Python code ran in the middle of a call: ForkError if it forked, and this is the child.
void check_same_process(const Origin& origin);

// For calls that run without the GIL: lets Ctrl-C end them, looked at every tenth of a second.
Checkpointer signal_checker();

}  // namespace moerun::python
