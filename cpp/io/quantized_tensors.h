// Checkpoints whose weights are quantised, told by the names of their tensors.
#pragma once

#include <string>
#include <string_view>

namespace moerun {

// "GPTQ or AWQ" for the name of a tensor that only weights of that format have; empty for others.
std::string_view quantization_of_tensor(std::string_view name);

}  // namespace moerun
