// Sizes of memory as people read them.
#pragma once

#include <cstddef>
#include <string>

namespace moerun {

// A limit is rounded to the side on which the printed size still keeps it.
enum class Rounding { nearest, up, down };

// "1001 bytes", "288 KiB", "4.5 MiB", "79.1 GiB"; two decimals.
std::string bytes_text(std::size_t bytes, Rounding rounding = Rounding::nearest);

}  // namespace moerun
