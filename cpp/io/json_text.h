// Small JSON files of unknown origin: read with a bound, parsed with a bound. For .cc files only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace moerun {

// The bytes of a regular file of at most `max_bytes`. FileError where there is none, or it is not
// a regular file, or longer.
std::string read_text_file(const std::filesystem::path& path, std::uint64_t max_bytes);

// Parses a JSON object. FormatError, naming `where` and the field that was being read, for text
// that is not JSON (NaN and Infinity are not), for an object that names a field twice, and for more
// nesting or values than any real file has (a few bytes of JSON can stand for a lot of memory).
nlohmann::json parse_json_object(std::string_view text, const std::string& where,
                                 std::size_t max_values = 1'000'000);

// What the parser says of an error, without its own names for it, in quotes.
std::string parse_error_text(std::string_view what);

}  // namespace moerun
