// model.safetensors.index.json: any bytes either parse into a map to names that stay in the
// directory, or throw a moerun::Error that names the file.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "base/error.h"
#include "io/checkpoint_index.h"

namespace {

void require(bool condition) {
  if (!condition) std::abort();
}

void check_stays_inside(const std::string& name) {
  const std::filesystem::path path(name);
  require(!name.empty() && name.find('\0') == std::string::npos && path.is_relative());
  for (const auto& part : path) require(!part.empty() && part != ".." && part != ".");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    for (const auto& [tensor, name] : moerun::parse_checkpoint_index(text, "index.json")) {
      check_stays_inside(name);
    }
  } catch (const moerun::Error& error) {
    require(std::string_view(error.what()).starts_with("index.json: "));
  }
  return 0;
}
