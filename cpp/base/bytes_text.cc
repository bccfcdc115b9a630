#include "base/bytes_text.h"

#include <cmath>
#include <iterator>

#include "base/error.h"

namespace moerun {

std::string bytes_text(std::size_t bytes, Rounding rounding) {
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB"};
  constexpr double kStep = 1024;
  if (bytes < 1024) return message(bytes, bytes == 1 ? " byte" : " bytes");
  double size = static_cast<double>(bytes) / kStep;
  std::size_t unit = 0;
  for (; size >= kStep && unit + 1 < std::size(kUnits); ++unit) size /= kStep;
  const double scaled = size * 100;
  const double rounded = rounding == Rounding::up     ? std::ceil(scaled)
                         : rounding == Rounding::down ? std::floor(scaled)
                                                      : std::round(scaled);
  return message(rounded / 100, " ", kUnits[unit]);
}

}  // namespace moerun
