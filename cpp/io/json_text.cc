#include "io/json_text.h"

#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "io/file_descriptor.h"
#include "io/lfs_pointer.h"
#include "io/quote.h"

namespace moerun {

using nlohmann::json;

std::string read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes) {
  const FileDescriptor file = open_regular_file(path);
  if (file.size() > max_bytes) {
    throw FileError(message(path.string(), ": the file has ", file.size(),
                            " bytes, expected at most ", max_bytes,
                            "; it is not the file that its name says"));
  }
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.read_at(0, std::as_writable_bytes(std::span(text)));
  check_not_lfs_pointer(text, path.string());
  return text;
}

namespace {

constexpr int kMaxDepth = 32;

// Watches the parser: counts, and knows which field is being read.
class Guard {
 public:
  Guard(const std::string& where, std::size_t max_values) : where_(where), max_(max_values) {}

  bool operator()(int depth, json::parse_event_t event, json& parsed) {
    if (depth > kMaxDepth) {
      throw FormatError(message(where_, ": ", field(), "nested more than ", kMaxDepth,
                                " levels deep, expected a plain JSON object"));
    }
    if (++count_ > max_) {
      throw FormatError(
          message(where_, ": more than ", max_, " values, which no real file of this kind has"));
    }
    if (event == json::parse_event_t::object_start) {
      keys_.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      keys_.pop_back();
    } else if (event == json::parse_event_t::key) {
      last_key_ = parsed.get<std::string>();
      if (!keys_.back().insert(last_key_).second) {
        throw FormatError(message(where_, ": the field ", quote(last_key_),
                                  " is given twice, expected once; remove one"));
      }
    }
    return true;
  }

  std::string field() const {
    return last_key_.empty() ? "" : message("at field ", quote(last_key_), ": ");
  }

 private:
  const std::string& where_;
  std::size_t max_;
  std::size_t count_ = 0;
  std::string last_key_;
  std::vector<std::set<std::string>> keys_;  // of the objects that are open
};

}  // namespace

std::string parse_error_text(std::string_view what) {
  const auto bracket = what.find("] ");  // of "[json.exception.parse_error.101] "
  return quote(bracket == std::string_view::npos ? what : what.substr(bracket + 2), 200);
}

json parse_json_object(std::string_view text, const std::string& where, std::size_t max_values) {
  // The parser would take a zero byte for the end of the text.
  if (const auto zero = text.find('\0'); zero != std::string_view::npos) {
    throw FormatError(message(where, ": a zero byte at offset ", zero,
                              ", expected JSON text; the file is damaged: download it again"));
  }
  Guard guard(where, max_values);
  json parsed;
  try {
    // By reference: the parser keeps a copy of what it is given.
    const json::parser_callback_t watch = [&guard](int depth, json::parse_event_t event,
                                                   json& value) {
      return guard(depth, event, value);
    };
    parsed = json::parse(text, watch);
  } catch (const json::exception& error) {
    throw FormatError(message(where, ": ", guard.field(), "expected valid JSON (NaN and Infinity ",
                              "are not), found: ", parse_error_text(error.what())));
  }
  if (!parsed.is_object()) {
    throw FormatError(
        message(where, ": found a JSON ", parsed.type_name(), ", expected an object {...}"));
  }
  return parsed;
}

}  // namespace moerun
