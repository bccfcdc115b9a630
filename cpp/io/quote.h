// Text of a file, made fit for a message: names in hostile files hold anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace moerun {

// 'text' in single quotes, control bytes escaped, cut after about `max_bytes`.
std::string quote(std::string_view text, std::size_t max_bytes = 100);

// "[2, 3]"
std::string shape_text(std::span<const std::uint64_t> shape);

}  // namespace moerun
