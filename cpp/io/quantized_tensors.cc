#include "io/quantized_tensors.h"

#include <utility>

namespace moerun {

std::string_view quantization_of_tensor(std::string_view name) {
  constexpr std::pair<std::string_view, std::string_view> kSuffixes[] = {
      {".qweight", "GPTQ or AWQ"},
      {".qzeros", "GPTQ or AWQ"},
      {".absmax", "bitsandbytes"},
      {".SCB", "bitsandbytes"},
      {"_blocks", "MXFP4"},
      {".weight_packed", "compressed-tensors"},
      {".weight_scale_inv", "FP8"},
      {".weight_scale", "FP8 or compressed-tensors"},
      {".scales", "MLX or a similar format"}};
  for (const auto& [suffix, format] : kSuffixes) {
    if (name.ends_with(suffix)) return format;
  }
  return {};
}

}  // namespace moerun
