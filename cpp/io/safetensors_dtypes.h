// All element types of the safetensors format, so that files holding others than weights are sized
// and checked too.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "base/dtype.h"

namespace moerun {

struct SafetensorsDType {
  std::string_view name;
  std::uint32_t bits;
  std::optional<DType> dtype;
};

inline constexpr std::array<SafetensorsDType, 22> kSafetensorsDTypes = {{
    {"F32", 32, DType::f32},          {"F16", 16, DType::f16},
    {"BF16", 16, DType::bf16},        {"F64", 64, std::nullopt},
    {"C64", 64, std::nullopt},        {"I64", 64, std::nullopt},
    {"U64", 64, std::nullopt},        {"I32", 32, std::nullopt},
    {"U32", 32, std::nullopt},        {"I16", 16, std::nullopt},
    {"U16", 16, std::nullopt},        {"I8", 8, std::nullopt},
    {"U8", 8, std::nullopt},          {"BOOL", 8, std::nullopt},
    {"F8_E4M3", 8, std::nullopt},     {"F8_E5M2", 8, std::nullopt},
    {"F8_E8M0", 8, std::nullopt},     {"F8_E4M3FNUZ", 8, std::nullopt},
    {"F8_E5M2FNUZ", 8, std::nullopt}, {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},     {"F4", 4, std::nullopt},
}};

}  // namespace moerun
