// Fields of a JSON object, each held to a type and a range. For .cc files only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moerun {

// Limits far above any model: they keep products of sizes within 64 bits, and a damaged number from
// turning into an allocation.
inline constexpr std::int64_t kMaxHiddenSize = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxIntermediateSize = std::int64_t{1} << 24;
inline constexpr std::int64_t kMaxLayers = 4096;
inline constexpr std::int64_t kMaxVocabSize = std::int64_t{1} << 24;
inline constexpr std::int64_t kMaxExperts = 65536;
inline constexpr std::int64_t kMaxHeads = std::int64_t{1} << 20;
inline constexpr std::int64_t kMaxHeadDim = 4096;
inline constexpr std::int64_t kMaxHeadsTimesDim = std::int64_t{1} << 22;
inline constexpr std::int64_t kMaxPositions = (std::int64_t{1} << 31) - 1;
// Positive reals outside these become zero or infinite when multiplied as float32.
inline constexpr double kMinReal = 1e-12;
inline constexpr double kMaxReal = 1e12;

// A view of `object`; both arguments must outlive it. Methods throw FormatError naming file, field,
// what was found and what was expected. A field that is null counts as absent.
class ConfigReader {
 public:
  // `prefix` stands before field names in messages, e.g. "rope_scaling.".
  ConfigReader(const nlohmann::json& object, const std::string& where, std::string prefix = "")
      : object_(object), where_(where), prefix_(std::move(prefix)) {}

  const std::string& where() const { return where_; }
  std::string field(std::string_view key) const;  // "file: field 'key'"

  bool is_present(std::string_view key) const;           // also when null
  bool has(std::string_view key) const;                  // and not null
  const nlohmann::json& at(std::string_view key) const;  // of a field that it has

  std::int64_t integer(std::string_view key, std::int64_t absent, std::int64_t min,
                       std::int64_t max) const;
  double real(std::string_view key, double absent, double min, double max) const;
  std::optional<double> optional_real(std::string_view key, double min, double max) const;
  bool boolean(std::string_view key, bool absent) const;
  std::string text(std::string_view key, std::string_view absent) const;
  // A list of whole numbers, or a single one; empty where absent.
  std::vector<std::int64_t> integers(std::string_view key, std::int64_t min,
                                     std::int64_t max) const;
  std::vector<double> reals(std::string_view key, std::size_t count, double min, double max) const;

  [[noreturn]] void fail(std::string_view key, const nlohmann::json& found,
                         const std::string& expected) const;
  [[noreturn]] void fail(std::string_view key, const std::string& expected) const;

 private:
  std::int64_t to_integer(std::string_view key, const nlohmann::json& value, std::int64_t min,
                          std::int64_t max) const;
  double to_real(std::string_view key, const nlohmann::json& value, double min, double max) const;

  const nlohmann::json& object_;
  const std::string& where_;
  std::string prefix_;
};

}  // namespace moerun
