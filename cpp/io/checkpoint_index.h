// model.safetensors.index.json: which shard holds which tensor.
#pragma once

#include <map>
#include <string>
#include <string_view>

namespace moerun {

// tensor name -> file name, which may have folders before it ("sub/model-00001.safetensors").
// FormatError for anything else, in particular for names that lead out of the directory.
std::map<std::string, std::string> parse_checkpoint_index(std::string_view json_text,
                                                          const std::string& where);

}  // namespace moerun
