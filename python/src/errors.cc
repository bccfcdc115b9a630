#include "base/error.h"

#include <cstring>
#include <exception>

#include "bindings.h"

namespace moerun::python {
namespace {

// The exception classes are Python's own (moerun/errors.py), so that they can have two bases.
void raise(const char* class_name, const char* text) {
  const py::object type = py::module_::import("moerun.errors").attr(class_name);
  // A message may quote what is not UTF-8: a path, a field of a damaged file.
  const auto message = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text, static_cast<Py_ssize_t>(std::strlen(text)), "replace"));
  if (message) PyErr_SetObject(type.ptr(), message.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidArgument& error) {
    raise("InvalidArgumentError", error.what());
  } catch (const FileError& error) {
    raise(error.not_found() ? "MissingFileError" : "FileError", error.what());
  } catch (const FormatError& error) {
    raise("FormatError", error.what());
  } catch (const UnsupportedModel& error) {
    raise("UnsupportedModelError", error.what());
  } catch (const OutOfMemory& error) {
    raise("OutOfMemoryError", error.what());
  } catch (const DeviceError& error) {
    raise("DeviceError", error.what());
  } catch (const ForkError& error) {
    raise("ForkError", error.what());
  } catch (const Error& error) {
    raise("MoerunError", error.what());
  }
}

}  // namespace

void register_errors(py::module_&) { py::register_local_exception_translator(translate); }

}  // namespace moerun::python
