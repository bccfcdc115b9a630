// Every kernel set this processor can run, against loops in double precision.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "base/host_memory.h"
#include "check.h"
#include "device/cpu/kernel_table.h"
#include "device/op_params.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

std::vector<const CpuKernels*> all_kernels() {
  std::vector<const CpuKernels*> all;
  for (const auto& name : supported_cpu_kernels()) all.push_back(&choose_cpu_kernels(name));
  return all;
}

template <typename T>
std::vector<T*> row_pointers(std::vector<float>& data, std::size_t rows, std::size_t pitch) {
  std::vector<T*> pointers;
  for (std::size_t r = 0; r < rows; ++r) pointers.push_back(data.data() + r * pitch);
  return pointers;
}

double silu(double x) { return x / (1 + std::exp(-x)); }

// Error of one product of k terms of size up to 1.
double tolerance(std::size_t k) { return 2e-5 * std::sqrt(static_cast<double>(k)); }

}  // namespace

TEST("dot products agree with a double-precision loop in every dtype and shape") {
  RandomWeights random(1);
  const HostMemory scratch(kKernelScratchBytes, "test");
  for (const CpuKernels* kernels : all_kernels()) {
    for (const DType dtype : kAllDTypes) {
      for (const std::size_t k : {32u, 96u, 1056u, 2080u}) {
        for (const std::size_t rows : {1u, 5u, 8u, 67u}) {
          for (const std::size_t tokens : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 17u, 120u}) {
            auto w = random.matrix(rows, k);
            auto x = random.matrix(tokens, k);
            const auto encoded = encode(w, dtype);
            std::vector<float> y(tokens * rows);
            kernels->dot(dtype, encoded.data(), k * size_of(dtype), rows, k,
                         row_pointers<const float>(x, tokens, k).data(),
                         row_pointers<float>(y, tokens, rows).data(), tokens, scratch.data());
            for (std::size_t t = 0; t < tokens; ++t) {
              for (std::size_t r = 0; r < rows; ++r) {
                double expected = 0;
                for (std::size_t i = 0; i < k; ++i) {
                  expected += static_cast<double>(w[r * k + i]) * x[t * k + i];
                }
                CHECK_NEAR(y[t * rows + r], expected, tolerance(k));
              }
            }
          }
        }
      }
    }
  }
}

TEST("a token's dot products have the same bits whatever tokens are beside it") {
  RandomWeights random(2);
  const HostMemory scratch(kKernelScratchBytes, "test");
  const std::size_t k = 1120;
  const std::size_t rows = 71;
  for (const CpuKernels* kernels : all_kernels()) {
    for (const DType dtype : kAllDTypes) {
      auto x = random.matrix(kMaxTokens, k);
      for (float& value : x) value *= 1.37f;  // not exact: rounding shows the order of additions
      const auto encoded = encode(random.matrix(rows, k), dtype);
      const auto xs = row_pointers<const float>(x, kMaxTokens, k);
      std::vector<float> alone(kMaxTokens * rows);
      const auto single = row_pointers<float>(alone, kMaxTokens, rows);
      for (std::size_t t = 0; t < kMaxTokens; ++t) {
        kernels->dot(dtype, encoded.data(), k * size_of(dtype), rows, k, &xs[t], &single[t], 1,
                     scratch.data());
      }
      for (std::size_t tokens = 2; tokens <= kMaxTokens; tokens += tokens < 20 ? 1 : 25) {
        std::vector<float> together(tokens * rows);
        kernels->dot(dtype, encoded.data(), k * size_of(dtype), rows, k, xs.data(),
                     row_pointers<float>(together, tokens, rows).data(), tokens, scratch.data());
        CHECK(std::memcmp(together.data(), alone.data(), together.size() * sizeof(float)) == 0);
      }
    }
  }
}

TEST("a quantum of an expert agrees with the formula, for any number of tokens and records") {
  RandomWeights random(3);
  const HostMemory scratch(kKernelScratchBytes, "test");
  const std::size_t hidden = 160;
  for (const CpuKernels* kernels : all_kernels()) {
    for (const DType dtype : kAllDTypes) {
      for (const std::size_t records : {1u, 3u, 4u, 18u, 32u}) {
        auto w = random.matrix(3 * records, hidden);
        const auto encoded = encode(w, dtype);
        auto x = random.matrix(kMaxTokens, hidden);
        for (float& value : x) value *= 0.117f;
        const auto xs = row_pointers<const float>(x, kMaxTokens, hidden);
        for (const std::size_t tokens : {1u, 2u, 6u, 7u, 13u, 120u}) {
          for (const bool accumulate : {false, true}) {
            std::vector<float> y(tokens * hidden, 0.5f);
            const auto ys = row_pointers<float>(y, tokens, hidden);
            kernels->segment_quantum(dtype, encoded.data(), records, hidden, xs.data(), ys.data(),
                                     tokens, accumulate, /*more_follows=*/false, scratch.data());
            std::vector<float> alone(hidden, 0.5f);
            float* single = alone.data();
            kernels->segment_quantum(dtype, encoded.data(), records, hidden, &xs[tokens - 1],
                                     &single, 1, accumulate, /*more_follows=*/false,
                                     scratch.data());
            CHECK(std::memcmp(alone.data(), ys[tokens - 1], hidden * sizeof(float)) == 0);
            std::vector<double> expected(hidden, accumulate ? 0.5 : 0.0);
            for (std::size_t i = 0; i < records; ++i) {
              double gate = 0;
              double up = 0;
              for (std::size_t h = 0; h < hidden; ++h) {
                gate += static_cast<double>(w[3 * i * hidden + h]) * x[(tokens - 1) * hidden + h];
                up +=
                    static_cast<double>(w[(3 * i + 1) * hidden + h]) * x[(tokens - 1) * hidden + h];
              }
              for (std::size_t h = 0; h < hidden; ++h) {
                expected[h] += silu(gate) * up * w[(3 * i + 2) * hidden + h];
              }
            }
            for (std::size_t h = 0; h < hidden; ++h) CHECK_NEAR(alone[h], expected[h], 2e-4);
          }
        }
      }
    }
  }
}

TEST("weighted sums of rows agree with the formula") {
  RandomWeights random(4);
  const std::size_t n = 96;
  for (const CpuKernels* kernels : all_kernels()) {
    for (const std::size_t rows : {1u, 7u, 300u}) {
      for (const std::size_t tokens : {1u, 5u, 12u}) {
        auto v = random.matrix(rows, n);
        auto p = random.matrix(tokens, rows);
        std::vector<float> y(tokens * n, 9.0f);
        kernels->weighted_sum(v.data(), n, rows, n,
                              row_pointers<const float>(p, tokens, padded(rows)).data(),
                              row_pointers<float>(y, tokens, n).data(), tokens);
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t c = 0; c < n; ++c) {
            double expected = 0;
            for (std::size_t j = 0; j < rows; ++j) {
              expected += static_cast<double>(p[t * padded(rows) + j]) * v[j * n + c];
            }
            CHECK_NEAR(y[t * n + c], expected, 1e-4);
          }
        }
      }
    }
  }
}

TEST("softmax of a row with a score that is not finite is NaN as a whole") {
  const float kBad[] = {std::numeric_limits<float>::quiet_NaN(),
                        std::numeric_limits<float>::infinity(),
                        -std::numeric_limits<float>::infinity()};
  for (const auto& name : supported_cpu_kernels()) {
    const CpuKernels& kernels = choose_cpu_kernels(name);
    for (const std::size_t n : {1u, 2u, 15u, 16u, 17u, 33u, 64u}) {
      for (std::size_t place = 0; place < n; ++place) {
        for (const float bad : kBad) {
          alignas(64) float x[80] = {};
          for (std::size_t i = 0; i < n; ++i) x[i] = 0.1f * static_cast<float>(i);
          x[place] = bad;
          kernels.softmax(x, n, 0.3f);
          for (std::size_t i = 0; i < n; ++i) CHECK(std::isnan(x[i]));
        }
      }
    }
  }
}

TEST("softmax agrees with the formula, also for large scores and odd lengths") {
  for (const CpuKernels* kernels : all_kernels()) {
    for (const std::size_t n : {1u, 2u, 15u, 16u, 17u, 100u}) {
      for (const float size : {0.0f, 1.0f, 50.0f, 1e4f}) {
        RandomWeights random(n);
        std::vector<float> x(n + 16, 7.0f);
        for (std::size_t i = 0; i < n; ++i) x[i] = size * random.value();
        std::vector<double> expected(n);
        double top = -1e300;
        for (std::size_t i = 0; i < n; ++i) top = std::max(top, 0.3 * x[i]);
        double sum = 0;
        for (std::size_t i = 0; i < n; ++i) sum += expected[i] = std::exp(0.3f * x[i] - top);
        kernels->softmax(x.data(), n, 0.3f);
        for (std::size_t i = 0; i < n; ++i) {
          CHECK_NEAR(x[i], expected[i] / sum, 1e-6 + 1e-3 * (size > 100) * expected[i] / sum);
        }
      }
    }
  }
}

TEST("norms agree with the formulas at sizes that are no multiple of a vector") {
  for (const CpuKernels* kernels : all_kernels()) {
    for (const std::size_t n : {1u, 20u, 72u, 200u}) {
      RandomWeights random(n);
      const auto x = random.matrix(1, n);
      const auto weight = random.matrix(1, n);
      const auto bias = random.matrix(1, n);
      std::vector<float> rms(padded(n));
      std::vector<float> layer(padded(n));
      kernels->rms_norm(x.data(), weight.data(), 1e-5f, rms.data(), n);
      kernels->layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, layer.data(), n);
      double mean = 0;
      double squares = 0;
      for (std::size_t i = 0; i < n; ++i) {
        mean += x[i] / static_cast<double>(n);
        squares += static_cast<double>(x[i]) * x[i] / static_cast<double>(n);
      }
      for (std::size_t i = 0; i < n; ++i) {
        const double variance = squares - mean * mean;
        CHECK_NEAR(rms[i], x[i] / std::sqrt(squares + 1e-5) * weight[i], 1e-5);
        CHECK_NEAR(layer[i], (x[i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i],
                   n == 1 ? 1e-3 : 2e-5);
      }
    }
  }
}

TEST("a kernel set that does not exist is refused by name") {
  CHECK_THROWS(InvalidArgument, choose_cpu_kernels("mmx"), "mmx", "auto", "portable");
}

}  // namespace moerun::test
