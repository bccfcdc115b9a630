#include "base/cpu_features.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <string>

namespace moerun {

CpuFeatures cpu_features() {
  CpuFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  features.avx512 = features.avx2 && __builtin_cpu_supports("avx512f") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
  features.avx512_bf16 = features.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return features;
}

int num_usable_cpus() {
  int count = 1;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) count = std::max(1, CPU_COUNT(&set));
  // cgroup v2: "<quota> <period>", or "max <period>" where there is no limit.
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (file >> quota >> period && quota != "max" && period > 0) {
    try {
      count = std::clamp(static_cast<int>(std::stod(quota) / period), 1, count);
    } catch (const std::exception&) {
      return count;  // an unreadable quota is no quota
    }
  }
  return count;
}

}  // namespace moerun
