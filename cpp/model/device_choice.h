// Which device a model runs on, and why.
#pragma once

#include <string>

namespace moerun {

struct DeviceChoice {
  std::string device;  // "cpu" or "cuda"
  std::string reason;
};

// `requested`: auto, cpu or cuda. Throws InvalidArgument for a name that is unknown, or for a
// device that cannot be had.
DeviceChoice choose_device(const std::string& requested);

}  // namespace moerun
