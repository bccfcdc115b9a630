// The token scheduler on arrays; moerun/scheduling.py is its documented face.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "base/error.h"
#include "bindings.h"
#include "model/routing_paths.h"
#include "model/token_scheduler.h"

namespace moerun::python {
namespace {

using Words = py::array_t<std::uint64_t, py::array::c_style | py::array::forcecast>;
using Reals = py::array_t<float, py::array::c_style | py::array::forcecast>;

// (sequences, words of a row).
RoutingPaths paths_of(const Words& words, std::size_t num_bits) {
  if (words.ndim() != 2) {
    throw InvalidArgument("paths: expected an array of shape (sequences, words)");
  }
  return {{words.data(), static_cast<std::size_t>(words.size())},
          static_cast<std::size_t>(words.shape(0)),
          num_bits,
          static_cast<std::size_t>(words.shape(1))};
}

// (sequences, layers, experts) to (sequences, words of a row).
Words likeliest_paths(const Reals& probabilities, std::size_t top_k) {
  if (probabilities.ndim() != 3) {
    throw InvalidArgument("probabilities: expected the shape (sequences, layers, experts)");
  }
  const auto num_sequences = static_cast<std::size_t>(probabilities.shape(0));
  const auto num_experts = static_cast<std::size_t>(probabilities.shape(2));
  const std::size_t num_bits = static_cast<std::size_t>(probabilities.shape(1)) * num_experts;
  const std::size_t pitch = path_words(num_bits);
  Words words({static_cast<py::ssize_t>(num_sequences), static_cast<py::ssize_t>(pitch)});
  for (std::size_t i = 0; i < num_sequences; ++i) {
    set_likeliest({probabilities.data() + i * num_bits, num_bits}, num_experts, top_k,
                  {words.mutable_data() + i * pitch, pitch});
  }
  return words;
}

std::vector<std::vector<std::size_t>> split(const Words& words, std::size_t num_bits,
                                            const std::vector<std::size_t>& sizes) {
  const RoutingPaths paths = paths_of(words, num_bits);
  const py::gil_scoped_release release;
  return split_batches(paths, sizes);
}

}  // namespace

void register_scheduling(py::module_& module) {
  module.def("likeliest_paths", &likeliest_paths);
  module.def("split_batches", &split);
  module.def("num_active_experts", [](const Words& words, std::size_t num_bits,
                                      const std::vector<std::size_t>& sequences) {
    return num_active_experts(paths_of(words, num_bits), sequences);
  });
}

}  // namespace moerun::python
