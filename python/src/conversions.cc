#include <pybind11/numpy.h>

#include <chrono>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "bindings.h"

namespace moerun::python {
namespace {

py::object to_python(const nlohmann::ordered_json& json) {
  switch (json.type()) {
    case nlohmann::json::value_t::object: {
      py::dict dict;
      for (const auto& [key, value] : json.items()) dict[py::str(key)] = to_python(value);
      return dict;
    }
    case nlohmann::json::value_t::array: {
      py::list list;
      for (const auto& value : json) list.append(to_python(value));
      return list;
    }
    case nlohmann::json::value_t::string:
      return py::str(json.get_ref<const std::string&>());
    case nlohmann::json::value_t::boolean:
      return py::bool_(json.get<bool>());
    case nlohmann::json::value_t::number_unsigned:
      return py::int_(json.get<std::uint64_t>());
    case nlohmann::json::value_t::number_integer:
      return py::int_(json.get<std::int64_t>());
    case nlohmann::json::value_t::number_float:
      return py::float_(json.get<double>());
    default:
      return py::none();
  }
}

std::int32_t token_id(const py::handle& value, std::size_t index) {
  // __index__ admits numpy's integers and refuses floats; bool is an int that nobody means.
  if (!PyIndex_Check(value.ptr()) || PyBool_Check(value.ptr())) {
    throw InvalidArgument(message("token_ids[", index, "]: expected an integer, found ",
                                  std::string(py::repr(value))));
  }
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long id = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0 || id < std::numeric_limits<std::int32_t>::min() ||
      id > std::numeric_limits<std::int32_t>::max()) {
    throw InvalidArgument(message("token_ids[", index, "]: expected a token id, found ",
                                  std::string(py::repr(value))));
  }
  return static_cast<std::int32_t>(id);
}

}  // namespace

py::object from_json(const std::string& text) {
  return to_python(nlohmann::ordered_json::parse(text));
}

std::vector<std::int32_t> token_ids_from(const py::object& ids) {
  if (py::isinstance<py::str>(ids) || py::isinstance<py::bytes>(ids) ||
      !py::isinstance<py::iterable>(ids)) {
    throw InvalidArgument(message("token_ids: expected a sequence of integers, found ",
                                  std::string(py::repr(py::type::of(ids)))));
  }
  std::vector<std::int32_t> result;
  for (const auto& value : ids) result.push_back(token_id(value, result.size()));
  return result;
}

void check_same_process(const Origin& origin) {
  if (origin.is_this_process()) return;
  throw ForkError(
      "the process was forked in the middle of a call, whose other threads exist only in the "
      "parent");
}

Checkpointer signal_checker() {
  using Clock = std::chrono::steady_clock;
  return [last = Clock::now(), origin = Origin()]() mutable {
    if (Clock::now() - last < std::chrono::milliseconds(100)) return;
    last = Clock::now();
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    check_same_process(origin);
  };
}

}  // namespace moerun::python
