#include "base/bytes_text.h"

#include <cmath>

#include "base/error.h"

namespace moerun {

std::string bytes_text(std::size_t bytes) {
  constexpr double kMiB = 1024.0 * 1024.0;
  constexpr double kSmallest = 0.1 * kMiB;
  const auto size = static_cast<double>(bytes);
  const auto rounded = [](double value) { return std::round(value * 100) / 100; };
  if (size < kSmallest) return message(bytes, " bytes");
  if (size < 1024 * kMiB) return message(rounded(size / kMiB), " MiB");
  return message(rounded(size / (1024 * kMiB)), " GiB");
}

}  // namespace moerun
