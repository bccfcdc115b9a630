// Typed errors. A message says what was found, what was expected, where, and what to do about it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace moerun {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A caller's argument is out of its documented range.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// A file cannot be opened, read or written. `not_found()` tells a missing file from a failing one.
class FileError : public Error {
 public:
  explicit FileError(const std::string& message, bool not_found = false)
      : Error(message), not_found_(not_found) {}
  bool not_found() const { return not_found_; }

 private:
  bool not_found_;
};

// A file was read, but what it says is wrong: a lying header, a missing tensor, a nonsense config.
class FormatError : public Error {
 public:
  using Error::Error;
};

// A well-formed model that this version cannot run.
class UnsupportedModel : public Error {
 public:
  using Error::Error;
};

// Memory of some tier ran out. A normal event for a runtime with budgets, hence its own type.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

// The caller asked a long operation to stop.
class Interrupted : public Error {
 public:
  using Error::Error;
};

// A device failed in the middle of its work. What is on it is lost: load the model again.
// `needs_restart()`: nor can this process use the device again.
class DeviceError : public Error {
 public:
  explicit DeviceError(const std::string& message, bool needs_restart = false)
      : Error(message), needs_restart_(needs_restart) {}
  bool needs_restart() const { return needs_restart_; }

 private:
  bool needs_restart_;
};

// A forked process cannot use an object that its parent made.
class ForkError : public Error {
 public:
  using Error::Error;
};

// Concatenates its arguments into one message: message("expected ", n, " bytes").
template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

}  // namespace moerun
