#include "base/version.h"

namespace moerun {

const char* version() { return MOERUN_VERSION; }

}  // namespace moerun
