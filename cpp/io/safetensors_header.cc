#include "io/safetensors_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string_view>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "io/json_text.h"
#include "io/quote.h"
#include "io/safetensors_dtypes.h"

namespace moerun {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxRank = 64;
constexpr const char* kDamaged = "; the file is damaged: download it again";

// An entry as written: offsets count from the end of the header.
struct Entry {
  std::string name;
  const SafetensorsDType* dtype = nullptr;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

// Accepts exactly the one form that a header has, so nothing else needs memory: nesting is at most
// two deep, and a value of any other kind than the one that is due throws at once.
class HeaderReader final : public nlohmann::json_sax<json> {
 public:
  explicit HeaderReader(const std::string& where) : where_(where) {}

  std::vector<Entry> entries;
  std::map<std::string, std::string> metadata;

  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override {
    unexpected(message("the number ", value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    unexpected(message("the number ", quote(text)));
  }
  bool binary(binary_t&) override { unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::shape_items) {
      if (entries.back().shape.size() == kMaxRank) {
        unexpected(message("more than ", kMaxRank, " dimensions"));
      }
      entries.back().shape.push_back(value);
    } else if (state_ == State::offset_items && num_offsets_ < 2) {
      (num_offsets_ == 0 ? entries.back().begin : entries.back().end) = value;
      ++num_offsets_;
    } else {
      unexpected(message("the number ", value));
    }
    return true;
  }

  bool string(string_t& text) override {
    if (state_ == State::metadata_value) {
      metadata[key_] = std::move(text);
      state_ = State::metadata_key;
    } else if (state_ == State::dtype_value) {
      const auto* found =
          std::find_if(kSafetensorsDTypes.begin(), kSafetensorsDTypes.end(),
                       [&](const SafetensorsDType& dtype) { return dtype.name == text; });
      if (found == kSafetensorsDTypes.end()) unexpected(quote(text));
      entries.back().dtype = found;
      state_ = State::entry_key;
    } else {
      unexpected(message("the text ", quote(text)));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ == State::start) {
      state_ = State::name;
    } else if (state_ == State::metadata) {
      state_ = State::metadata_key;
    } else if (state_ == State::entry) {
      seen_ = 0;
      state_ = State::entry_key;
    } else {
      unexpected("an object");
    }
    return true;
  }

  bool key(string_t& text) override {
    if (state_ == State::name) {
      if (text == "__metadata__") {
        if (std::exchange(has_metadata_, true)) fail("'__metadata__' is given twice");
        state_ = State::metadata;
      } else {
        entries.emplace_back().name = std::move(text);
        state_ = State::entry;
      }
    } else if (state_ == State::metadata_key) {
      if (metadata.contains(text)) {
        fail(message("'__metadata__': the field ", quote(text), " is given twice"));
      }
      key_ = std::move(text);
      state_ = State::metadata_value;
    } else {
      entry_key(text);
    }
    return true;
  }

  bool end_object() override {
    if (state_ == State::entry_key) {
      if (seen_ != (kHasDType | kHasShape | kHasOffsets)) {
        fail(message("tensor ", quote(entries.back().name), ": lacks ",
                     !(seen_ & kHasDType)   ? "'dtype'"
                     : !(seen_ & kHasShape) ? "'shape'"
                                            : "'data_offsets'",
                     ", expected exactly dtype, shape and data_offsets"));
      }
      state_ = State::name;
    } else if (state_ == State::metadata_key) {
      state_ = State::name;
    } else {
      state_ = State::done;
    }
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ == State::shape) {
      state_ = State::shape_items;
    } else if (state_ == State::offsets) {
      num_offsets_ = 0;
      state_ = State::offset_items;
    } else {
      unexpected("a list");
    }
    return true;
  }

  bool end_array() override {
    if (state_ == State::offset_items && num_offsets_ != 2) {
      unexpected(message(num_offsets_, " of them"));
    }
    state_ = State::entry_key;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const json::exception& e) override {
    std::string at;
    if (!entries.empty()) at = message("at or after tensor ", quote(entries.back().name), ": ");
    fail(message(at, "not valid JSON at byte ", position,
                 " of the header: ", parse_error_text(e.what())));
  }

 private:
  enum class State {
    start,
    name,
    metadata,
    metadata_key,
    metadata_value,
    entry,
    entry_key,
    dtype_value,
    shape,
    shape_items,
    offsets,
    offset_items,
    done
  };
  static constexpr unsigned kHasDType = 1, kHasShape = 2, kHasOffsets = 4;

  [[noreturn]] void fail(const std::string& what) const {
    throw FormatError(message(where_, ": header: ", what, kDamaged));
  }

  [[noreturn]] void unexpected(const std::string& found) const {
    const std::string tensor =
        entries.empty() ? "" : message("tensor ", quote(entries.back().name), ": ");
    switch (state_) {
      case State::metadata:
      case State::metadata_key:
        fail(message("'__metadata__': found ", found, ", expected an object of strings"));
      case State::metadata_value:
        fail(message("'__metadata__': field ", quote(key_), ": found ", found,
                     ", expected a string"));
      case State::entry:
        fail(message(tensor, "found ", found, ", expected {dtype, shape, data_offsets}"));
      case State::dtype_value:
        fail(message(tensor, "'dtype': found ", found,
                     ", expected a type of the safetensors format such as 'F32', 'F16', 'BF16'"));
      case State::shape:
      case State::shape_items:
        fail(message(tensor, "'shape': found ", found,
                     ", expected a list of whole numbers from 0 to 2^64 - 1"));
      case State::offsets:
      case State::offset_items:
        fail(message(tensor, "'data_offsets': found ", found,
                     ", expected two whole numbers from 0 to 2^64 - 1"));
      default:
        fail(message("found ", found, ", expected an object of tensors"));
    }
  }

  void entry_key(const std::string& text) {
    const unsigned bit = text == "dtype"          ? kHasDType
                         : text == "shape"        ? kHasShape
                         : text == "data_offsets" ? kHasOffsets
                                                  : 0;
    const std::string& tensor = entries.back().name;
    if (bit == 0) {
      fail(message("tensor ", quote(tensor), ": found the field ", quote(text),
                   ", expected exactly dtype, shape and data_offsets"));
    }
    if (seen_ & bit) {
      fail(message("tensor ", quote(tensor), ": the field ", quote(text), " is given twice"));
    }
    seen_ |= bit;
    state_ = bit == kHasDType   ? State::dtype_value
             : bit == kHasShape ? State::shape
                                : State::offsets;
  }

  const std::string& where_;
  State state_ = State::start;
  bool has_metadata_ = false;
  unsigned seen_ = 0;            // fields of the current entry
  std::size_t num_offsets_ = 0;  // of the current entry
  std::string key_;              // of the current metadata field
};

bool multiply(std::uint64_t& product, std::uint64_t factor) {
  if (factor != 0 && product > std::numeric_limits<std::uint64_t>::max() / factor) return false;
  product *= factor;
  return true;
}

// Bytes that shape and dtype ask for.
std::uint64_t expected_bytes(const Entry& entry, const std::string& at) {
  std::uint64_t bits = 1;
  bool fits = true;
  // A zero anywhere makes the product zero, but must not hide an overflow before it.
  for (const std::uint64_t n : entry.shape) fits = fits && multiply(bits, n);
  fits = fits && multiply(bits, entry.dtype->bits);
  if (!fits) {
    throw FormatError(message(at, "'shape' ", shape_text(entry.shape), " of ", entry.dtype->name,
                              " is more than 2^64 bits, expected a size that a file can have",
                              kDamaged));
  }
  if (bits % 8 != 0) {
    throw FormatError(message(at, "'shape' ", shape_text(entry.shape), " of ", entry.dtype->name,
                              " takes ", bits, " bits, expected whole bytes", kDamaged));
  }
  return bits / 8;
}

void check_names_differ(const std::vector<Entry>& entries, const std::string& where) {
  std::vector<std::string_view> names;
  names.reserve(entries.size());
  for (const Entry& entry : entries) names.push_back(entry.name);
  std::sort(names.begin(), names.end());
  const auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) {
    throw FormatError(message(where, ": header: tensor ", quote(*twice),
                              " is given twice, expected every name once", kDamaged));
  }
}

// Sorts by data, and holds the offsets to the sizes, to each other and to the end of the file.
void check_offsets(std::vector<Entry>& entries, std::uint64_t data_bytes,
                   const std::string& where) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t next = 0;
  const Entry* previous = nullptr;
  for (const Entry& entry : entries) {
    const std::string at = message(where, ": header: tensor ", quote(entry.name), ": ");
    const std::string offsets = message("'data_offsets' [", entry.begin, ", ", entry.end, "]");
    if (entry.begin > entry.end) {
      throw FormatError(message(at, offsets, " end before they begin", kDamaged));
    }
    const std::uint64_t bytes = expected_bytes(entry, at);
    if (entry.end - entry.begin != bytes) {
      throw FormatError(message(at, offsets, " span ", entry.end - entry.begin, " bytes, expected ",
                                bytes, " for shape ", shape_text(entry.shape), " of ",
                                entry.dtype->name, kDamaged));
    }
    if (entry.end > data_bytes) {
      throw FormatError(message(at, offsets, " end after the file's ", data_bytes,
                                " bytes of data; the file is cut off: download it again"));
    }
    if (entry.begin < next) {
      throw FormatError(message(at, offsets, " overlap tensor ", quote(previous->name),
                                ", expected them to begin at ", next, kDamaged));
    }
    if (entry.begin > next) {
      throw FormatError(
          message(at, offsets, " leave a gap, expected them to begin at ", next, kDamaged));
    }
    next = entry.end;
    previous = &entry;
  }
  if (next != data_bytes) {
    throw FormatError(message(where, ": header: the tensors end at byte ", next,
                              " of the data, expected the end of the file at ", data_bytes,
                              kDamaged));
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(ConstBytes header_json, std::uint64_t file_size,
                                           const std::string& where) {
  if (header_json.size() > kMaxSafetensorsHeaderBytes || file_size < 8 ||
      header_json.size() > file_size - 8) {
    throw FormatError(message(where, ": header: found a length of ", header_json.size(),
                              " bytes, expected at most ", kMaxSafetensorsHeaderBytes,
                              " and no more than the file's ", file_size, kDamaged));
  }
  const std::string_view text(reinterpret_cast<const char*>(header_json.data()),
                              header_json.size());
  if (text.empty() || text.front() != '{') {
    throw FormatError(message(where, ": header: found ", quote(text.substr(0, 1)),
                              ", expected it to begin with '{'; is this a safetensors file?"));
  }
  // The parser would take a zero byte for the end of the text.
  if (const auto zero = text.find('\0'); zero != std::string_view::npos) {
    throw FormatError(message(where, ": header: a zero byte at offset ", zero,
                              ", expected JSON padded with spaces", kDamaged));
  }
  HeaderReader reader(where);
  json::sax_parse(text, &reader);

  check_names_differ(reader.entries, where);
  const std::uint64_t data_start = 8 + header_json.size();
  check_offsets(reader.entries, file_size - data_start, where);

  SafetensorsHeader header;
  header.metadata = std::move(reader.metadata);
  header.tensors.reserve(reader.entries.size());
  for (Entry& entry : reader.entries) {
    header.tensors.push_back({std::move(entry.name), std::string(entry.dtype->name),
                              entry.dtype->dtype, std::move(entry.shape), data_start + entry.begin,
                              entry.end - entry.begin});
  }
  return header;
}

}  // namespace moerun
