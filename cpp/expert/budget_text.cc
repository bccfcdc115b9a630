#include "expert/budget_text.h"

#include <charconv>
#include <cmath>
#include <string>

#include "base/error.h"

namespace moerun {
namespace {

std::size_t parse(std::string_view option, std::string_view text, std::size_t total_bytes,
                  bool may_be_zero) {
  const auto fail = [&]() -> std::size_t {
    throw InvalidArgument(message(option,
                                  ": expected a share like 25%, a size like 6GiB or 500MB, or a "
                                  "number of bytes, ",
                                  may_be_zero ? "or 0" : "all above 0", ", found '", text, "'"));
  };
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{} || !std::isfinite(number) || number < 0) return fail();
  std::string unit(end, text.data() + text.size());
  unit.erase(0, unit.find_first_not_of(' ') == std::string::npos ? unit.size()
                                                                 : unit.find_first_not_of(' '));
  struct Unit {
    const char* name;
    double bytes;
  };
  constexpr Unit kUnits[] = {{"", 1},         {"B", 1},        {"kB", 1e3},    {"KB", 1e3},
                             {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12},   {"KiB", 1024.0},
                             {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40}};
  double bytes = -1;
  if (unit == "%") {
    if (number > 100) return fail();
    bytes = std::floor(number / 100 * static_cast<double>(total_bytes));
  } else {
    for (const Unit& known : kUnits) {
      if (unit == known.name) bytes = number * known.bytes;
    }
  }
  if (bytes < (may_be_zero ? 0 : 1) || bytes > 0x1p60) return fail();
  return static_cast<std::size_t>(bytes);
}

}  // namespace

std::size_t parse_budget(std::string_view text, std::size_t total_bytes) {
  return parse("expert_budget", text, total_bytes, /*may_be_zero=*/false);
}

std::size_t parse_kv_budget(std::string_view text, std::size_t total_bytes) {
  return parse("kv_budget", text, total_bytes, /*may_be_zero=*/false);
}

std::size_t parse_pin_limit(std::string_view text, std::size_t total_bytes) {
  return parse("pin_limit", text, total_bytes, /*may_be_zero=*/true);
}

}  // namespace moerun
