// The header of a safetensors file: eight bytes of length, JSON, then the data of all tensors.
// Everything it says is checked against the file before anything is used.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/view.h"

namespace moerun {

// The format's own limit, and the one of its other readers.
inline constexpr std::uint64_t kMaxSafetensorsHeaderBytes = 100'000'000;

struct TensorInfo {
  std::string name;
  std::string dtype_name;      // as in the file, e.g. "BF16", "I64", "F8_E4M3"
  std::optional<DType> dtype;  // of the three kinds that weights may have
  std::vector<std::uint64_t> shape;
  std::uint64_t offset = 0;  // from the start of the file
  std::uint64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<TensorInfo> tensors;  // in the order of their data
  std::map<std::string, std::string> metadata;
};

// Checks and parses the JSON of a header. `file_size` is that of the whole file: the data of the
// tensors must fill it from the end of the header to its own end, without gap or overlap.
// `where` names the file in messages. Throws FormatError.
SafetensorsHeader parse_safetensors_header(ConstBytes header_json, std::uint64_t file_size,
                                           const std::string& where);

}  // namespace moerun
