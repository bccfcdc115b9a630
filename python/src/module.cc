#include "bindings.h"

#include "base/version.h"

PYBIND11_MODULE(_moerun, module) {
  module.doc() = "The native part of moerun. Use the package `moerun`, which documents it.";
  module.attr("__version__") = moerun::version();
  moerun::python::register_errors(module);
  moerun::python::register_generation(module);
  moerun::python::register_batch(module);
  moerun::python::register_metrics(module);
  moerun::python::register_planning(module);
  moerun::python::register_scheduling(module);
  moerun::python::register_predictor(module);
  moerun::python::register_timing(module);
  moerun::python::register_model(module);
  moerun::python::register_tracing(module);
  moerun::python::register_simulation(module);
  moerun::python::register_info(module);
}
