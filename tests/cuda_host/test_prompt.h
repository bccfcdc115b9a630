// The shipped model on the device, and something for it to read.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"
#include "on_device.h"

namespace moerun::test {

inline const std::string kModel = MOERUN_TEST_MODEL;

inline std::vector<std::int32_t> some_tokens(std::size_t count) {
  std::vector<std::int32_t> ids;
  for (std::size_t i = 0; i < count; ++i)
    ids.push_back(static_cast<std::int32_t>(37 * i % 4000 + 5));
  return ids;
}

inline ModelOptions on_device(const std::string& budget = "") {
  ModelOptions options;
  options.context_length = 64;
  options.threads = 1;
  options.make_backend = make_device_backend;
  options.experts.budget = budget;
  return options;
}

}  // namespace moerun::test
