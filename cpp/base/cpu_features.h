// What the processor that runs us can do, asked at run time.
#pragma once

namespace moerun {

struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C, which every AVX2 processor we know has
  bool avx512 = false;       // F, BW, DQ and VL
  bool avx512_bf16 = false;  // vdpbf16ps, on top of avx512
};

// Counts a feature only if the operating system saves its registers too.
CpuFeatures cpu_features();

// The number of processors this process may run on (its affinity and cgroup quota), at least 1.
int num_usable_cpus();

}  // namespace moerun
