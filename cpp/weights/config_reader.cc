#include "weights/config_reader.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/quote.h"

namespace moerun {

using nlohmann::json;

namespace {

// A value as a person would write it; its text may be long and its bytes anything.
std::string found_text(const json& value) {
  if (value.is_string()) return message("the text ", quote(value.get_ref<const std::string&>()));
  if (value.is_object()) return message("an object of ", value.size(), " fields");
  if (value.is_array()) return message("a list of ", value.size());
  return value.dump();
}

}  // namespace

std::string ConfigReader::field(std::string_view key) const {
  return message(where_, ": field ", quote(prefix_ + std::string(key)));
}

bool ConfigReader::is_present(std::string_view key) const {
  return object_.contains(std::string(key));
}

bool ConfigReader::has(std::string_view key) const {
  const auto found = object_.find(std::string(key));
  return found != object_.end() && !found->is_null();
}

const json& ConfigReader::at(std::string_view key) const { return *object_.find(std::string(key)); }

void ConfigReader::fail(std::string_view key, const json& found,
                        const std::string& expected) const {
  throw FormatError(message(field(key), ": found ", found_text(found), ", expected ", expected,
                            "; correct the file or download it again"));
}

void ConfigReader::fail(std::string_view key, const std::string& expected) const {
  if (has(key)) fail(key, at(key), expected);
  throw FormatError(message(field(key), ": is missing, expected ", expected,
                            "; correct the file or download it again"));
}

std::int64_t ConfigReader::to_integer(std::string_view key, const json& value, std::int64_t min,
                                      std::int64_t max) const {
  // Unsigned numbers above 2^63 would come out negative, hence the comparison before the cast.
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX));
  const std::int64_t number = fits ? value.get<std::int64_t>() : 0;
  if (!fits || number < min || number > max) {
    fail(key, value, message("a whole number from ", min, " to ", max));
  }
  return number;
}

double ConfigReader::to_real(std::string_view key, const json& value, double min,
                             double max) const {
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= min && number <= max)) {
    fail(key, value, message("a number from ", min, " to ", max));
  }
  return number;
}

std::int64_t ConfigReader::integer(std::string_view key, std::int64_t absent, std::int64_t min,
                                   std::int64_t max) const {
  return has(key) ? to_integer(key, at(key), min, max) : absent;
}

double ConfigReader::real(std::string_view key, double absent, double min, double max) const {
  return has(key) ? to_real(key, at(key), min, max) : absent;
}

std::optional<double> ConfigReader::optional_real(std::string_view key, double min,
                                                  double max) const {
  if (!has(key)) return std::nullopt;
  return to_real(key, at(key), min, max);
}

bool ConfigReader::boolean(std::string_view key, bool absent) const {
  if (!has(key)) return absent;
  if (!at(key).is_boolean()) fail(key, "true or false");
  return at(key).get<bool>();
}

std::string ConfigReader::text(std::string_view key, std::string_view absent) const {
  if (!has(key)) return std::string(absent);
  if (!at(key).is_string()) fail(key, "text");
  return at(key).get<std::string>();
}

std::vector<std::int64_t> ConfigReader::integers(std::string_view key, std::int64_t min,
                                                 std::int64_t max) const {
  if (!has(key)) return {};
  const json& value = at(key);
  if (!value.is_array()) return {to_integer(key, value, min, max)};
  std::vector<std::int64_t> numbers;
  for (const json& item : value) numbers.push_back(to_integer(key, item, min, max));
  return numbers;
}

std::vector<double> ConfigReader::reals(std::string_view key, std::size_t count, double min,
                                        double max) const {
  if (!has(key) || !at(key).is_array() || at(key).size() != count) {
    fail(key, message("a list of ", count, " numbers"));
  }
  std::vector<double> numbers;
  for (const json& item : at(key)) numbers.push_back(to_real(key, item, min, max));
  return numbers;
}

}  // namespace moerun
