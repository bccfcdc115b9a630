#include "device/cpu/kernel_table.h"

#include "base/cpu_features.h"
#include "base/error.h"

namespace moerun {
namespace {

struct Candidate {
  const CpuKernels* kernels;
  bool supported;
};

// Best first. avx512 stands before avx512_bf16: where both were measured (Emerald Rapids), one core
// does 88 G float32 multiply-adds a second but 43 G by vdpbf16ps, of which a value split in two
// needs double; decoding is bound by memory either way.
std::vector<Candidate> candidates() {
  const CpuFeatures features = cpu_features();
  std::vector<Candidate> all;
  for (const Candidate& candidate :
       {Candidate{cpu_kernels_avx512(), features.avx512},
        Candidate{cpu_kernels_avx512_bf16(), features.avx512_bf16},
        Candidate{cpu_kernels_avx2(), features.avx2}, Candidate{cpu_kernels_portable(), true}}) {
    if (candidate.kernels != nullptr) all.push_back(candidate);
  }
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> compiled_cpu_kernels() {
  std::vector<std::string> names;
  for (const auto& candidate : candidates()) names.emplace_back(candidate.kernels->name);
  return names;
}

std::vector<std::string> supported_cpu_kernels() {
  std::vector<std::string> names;
  for (const auto& candidate : candidates()) {
    if (candidate.supported) names.emplace_back(candidate.kernels->name);
  }
  return names;
}

const CpuKernels& choose_cpu_kernels(std::string_view name) {
  for (const auto& candidate : candidates()) {
    if (candidate.supported && (name == "auto" || name == candidate.kernels->name)) {
      return *candidate.kernels;
    }
  }
  throw InvalidArgument(message("cpu_kernels: this processor and build cannot run '", name,
                                "'; expected auto or one of ", joined(supported_cpu_kernels())));
}

}  // namespace moerun
