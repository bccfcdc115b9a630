#include "io/checkpoint_index.h"

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json_text.h"
#include "io/quote.h"

namespace moerun {
namespace {

bool is_plain_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find_first_of(std::string_view("\\\0", 2)) == std::string_view::npos;
}

// Plain names between slashes: such a path cannot leave the directory that it starts in.
bool leads_down(std::string_view path) {
  constexpr std::size_t kMaxPathBytes = 4095;
  if (path.size() > kMaxPathBytes) return false;
  for (std::size_t slash = path.find('/'); slash != std::string_view::npos;
       slash = path.find('/')) {
    if (!is_plain_name(path.substr(0, slash))) return false;
    path.remove_prefix(slash + 1);
  }
  return is_plain_name(path);
}

}  // namespace

std::map<std::string, std::string> parse_checkpoint_index(std::string_view json_text,
                                                          const std::string& where) {
  const nlohmann::json index = parse_json_object(json_text, where, /*max_values=*/4'000'000);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    throw FormatError(message(where, ": field 'weight_map': found ",
                              weight_map == index.end() ? "none" : weight_map->type_name(),
                              ", expected an object from tensor names to file names"));
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string()) {
      throw FormatError(message(where, ": field 'weight_map': tensor ", quote(tensor), ": found a ",
                                file.type_name(), ", expected a file name"));
    }
    const auto& name = file.get_ref<const std::string&>();
    if (!leads_down(name)) {
      throw FormatError(message(where, ": field 'weight_map': tensor ", quote(tensor), ": found ",
                                quote(name), ", expected the name of a file in the same ",
                                "directory or in a folder below it; download the index again"));
    }
    shards.emplace(tensor, name);
  }
  return shards;
}

}  // namespace moerun
