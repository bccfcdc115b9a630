// A test is a function registered by name; a check that fails throws. One executable runs them all:
//   moerun_tests            runs every test
//   moerun_tests --list     prints their names
//   moerun_tests NAME...    runs these
#pragma once

#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace moerun::test {

struct Test {
  std::string name;
  std::function<void()> body;
};

std::vector<Test>& registry();

struct Registration {
  Registration(const char* name, std::function<void()> body) {
    registry().push_back({name, std::move(body)});
  }
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Args>
[[noreturn]] void fail(const char* file, int line, const Args&... args) {
  std::ostringstream out;
  out << file << ":" << line << ": ";
  (out << ... << args);
  throw Failure(out.str());
}

// Fails unless `body` throws an `E` whose message contains every one of `parts`.
template <typename E, typename Body>
void expect_throw(const char* file, int line, Body&& body, const std::vector<std::string>& parts) {
  try {
    body();
  } catch (const E& error) {
    for (const auto& part : parts) {
      if (std::string(error.what()).find(part) == std::string::npos) {
        fail(file, line, "the message lacks '", part, "': ", error.what());
      }
    }
    return;
  }
  fail(file, line, "nothing was thrown");
}

}  // namespace moerun::test

#define MOERUN_CONCAT2(a, b) a##b
#define MOERUN_CONCAT(a, b) MOERUN_CONCAT2(a, b)

#define TEST(name)                                                                       \
  static void MOERUN_CONCAT(test_body_, __LINE__)();                                     \
  static const ::moerun::test::Registration MOERUN_CONCAT(test_registration_, __LINE__)( \
      name, MOERUN_CONCAT(test_body_, __LINE__));                                        \
  static void MOERUN_CONCAT(test_body_, __LINE__)()

#define CHECK(condition) \
  if (!(condition)) ::moerun::test::fail(__FILE__, __LINE__, "not true: ", #condition)

#define CHECK_EQ(a, b)                                                                      \
  do {                                                                                      \
    const auto check_a = (a);                                                               \
    const auto check_b = (b);                                                               \
    if (!(check_a == check_b)) {                                                            \
      ::moerun::test::fail(__FILE__, __LINE__, #a, " == ", #b, " does not hold: ", check_a, \
                           " against ", check_b);                                           \
    }                                                                                       \
  } while (false)

#define CHECK_NEAR(a, b, tolerance)                                                         \
  do {                                                                                      \
    const double check_a = (a);                                                             \
    const double check_b = (b);                                                             \
    if (!(std::fabs(check_a - check_b) <= (tolerance))) {                                   \
      ::moerun::test::fail(__FILE__, __LINE__, #a, " is ", check_a, ", expected ", check_b, \
                           " within ", tolerance);                                          \
    }                                                                                       \
  } while (false)

#define CHECK_THROWS(E, expression, ...) \
  ::moerun::test::expect_throw<E>(__FILE__, __LINE__, [&] { (void)(expression); }, {__VA_ARGS__})
