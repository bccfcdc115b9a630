#pragma once

namespace moerun {

const char* version();  // "0.1.0"

}  // namespace moerun
