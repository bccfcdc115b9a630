// Sizes of memory as people read them.
#pragma once

#include <cstddef>
#include <string>

namespace moerun {

// "1001 bytes", "4.5 MiB", "79.1 GiB".
std::string bytes_text(std::size_t bytes);

}  // namespace moerun
