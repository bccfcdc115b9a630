// Products with matrices of weights against the CPU backend.
#include <map>
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/linear.h"
#include "on_device.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

using cuda::Precision;

struct Layer {
  MatrixView shape;
  std::vector<std::byte> host;
  OnDevice<std::byte> device;
  std::vector<float> host_bias;
  OnDevice<float> device_bias;

  Layer(std::size_t rows, std::size_t cols, DType dtype, RandomWeights& random)
      : Layer(random.matrix(rows, cols), rows, cols, dtype, random) {}
  Layer(const std::vector<float>& values, std::size_t rows, std::size_t cols, DType dtype,
        RandomWeights& random)
      : shape{nullptr, dtype, rows, cols, padded(cols)},
        host(encode(values, dtype)),
        device(host),
        host_bias(random.matrix(1, rows)),
        device_bias(host_bias) {}

  MatrixView host_view() const {
    MatrixView view = shape;
    view.data = host.data();
    return view;
  }
  MatrixView device_view() const {
    MatrixView view = shape;
    view.data = device.data();
    return view;
  }
};

TestRows random_rows(std::size_t rows, std::size_t cols, RandomWeights& random) {
  auto values = random.matrix(rows, cols);
  for (float& value : values) value *= 0.137f;  // not exact in bf16
  return {std::move(values), rows, cols};
}

void check_products(const Layer& layer, std::size_t tokens, Precision precision, double tolerance,
                    RandomWeights& random) {
  const auto cpu = make_cpu_backend(1, "portable");
  const auto cpu_stream = cpu->make_stream();
  TestStream stream;
  TestRows x = random_rows(tokens, layer.shape.cols, random);
  TestRows y = random_rows(tokens, layer.shape.rows, random);
  const LinearOutput first{0.75f, /*accumulate=*/true};
  const LinearOutput second{1.5f, /*accumulate=*/false};
  const LinearWeights host{layer.host_view(), layer.host_bias.data()};
  const LinearWeights device{layer.device_view(), layer.device_bias.data()};
  cpu->linear(*cpu_stream, host, x.host(), y.host(), first);
  cuda::linear(stream, device, x.device(), y.device(), first, precision);
  stream.synchronize();
  y.check_same(tolerance);
  cpu->linear(*cpu_stream, {host.weight, nullptr}, x.host(), y.host(), second);
  cuda::linear(stream, {device.weight, nullptr}, x.device(), y.device(), second, precision);
  stream.synchronize();
  y.check_same(tolerance);
}

}  // namespace

TEST("exact products on the device agree with the CPU in every dtype and shape") {
  for (const DType dtype : kAllDTypes) {
    for (const std::size_t rows : {1u, 33u, 71u}) {
      for (const std::size_t cols : {20u, 96u, 300u}) {
        RandomWeights random(rows + cols);
        const Layer layer(rows, cols, dtype, random);
        for (const std::size_t tokens : {1u, 2u, 3u, 5u, 8u, 17u, 40u}) {
          check_products(layer, tokens, Precision::exact, 1e-5, random);
        }
      }
    }
  }
}

TEST("long rows are summed as on the CPU") {
  for (const DType dtype : kAllDTypes) {
    RandomWeights random(2);
    const Layer layer(33, 2080, dtype, random);
    for (const std::size_t tokens : {1u, 2u, 4u, 8u, 9u}) {
      check_products(layer, tokens, Precision::exact, 1e-5, random);
    }
  }
}

TEST("many rows are spread over blocks of more warps with the same result") {
  RandomWeights random(1);
  const Layer layer(1029, 64, DType::bf16, random);
  for (const std::size_t tokens : {1u, 3u}) {
    check_products(layer, tokens, Precision::exact, 1e-5, random);
  }
}

TEST("products on tensor cores agree with the CPU as far as bf16 and tf32 go") {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    const double tolerance = dtype == DType::bf16 ? 1e-2 : 1e-3;
    for (const std::size_t cols : {20u, 96u, 200u}) {
      for (const std::size_t rows : {33u, 130u}) {
        RandomWeights random(rows + cols);
        const Layer layer(rows, cols, dtype, random);
        for (const std::size_t tokens : {9u, 33u, 70u}) {
          check_products(layer, tokens, Precision::tensor_cores, tolerance, random);
        }
        check_products(layer, 5, Precision::tensor_cores, 1e-5, random);
      }
    }
  }
}

TEST("F16 weights take activations that F16 does not hold") {
  RandomWeights random(7);
  const Layer layer(33, 96, DType::f16, random);
  for (const float size : {1e-9f, 7e4f, 1e30f}) {
    const std::size_t tokens = 9;
    auto values = random.matrix(tokens, 96);
    for (float& value : values) value *= size;
    TestRows x(std::move(values), tokens, 96);
    TestRows y(tokens, 33);
    const auto cpu = make_cpu_backend(1, "portable");
    const auto cpu_stream = cpu->make_stream();
    TestStream stream;
    cpu->linear(*cpu_stream, {layer.host_view(), nullptr}, x.host(), y.host(), {});
    cuda::linear(stream, {layer.device_view(), nullptr}, x.device(), y.device(), {},
                 Precision::tensor_cores);
    stream.synchronize();
    y.check_same(1e-3);
  }
}

TEST("tensor cores add exact products exactly, in tiles of every size") {
  // Activations of few bits, and weights of as many as the dtype has: rounding and sums in float32
  // lose nothing.
  RandomWeights random(3);
  const auto cpu = make_cpu_backend(1, "portable");
  const auto cpu_stream = cpu->make_stream();
  TestStream stream;
  struct Shape {
    std::size_t tokens;
    std::size_t rows;
    DType dtype;
  };
  const Shape shapes[] = {
      {10, 40, DType::bf16}, {130, 70, DType::bf16},           {10, 40, DType::f16},
      {130, 70, DType::f16}, {65, 128 * 128 + 9, DType::bf16}, {65, 128 * 128 + 9, DType::f16}};
  for (const auto& [tokens, rows, dtype] : shapes) {
    const std::size_t cols = 36;
    auto values = random.matrix(rows, cols);
    for (float& value : values) value *= dtype == DType::f16 ? 17.0f / 16 : 1;
    const Layer layer(values, rows, cols, dtype, random);
    TestRows x(random.matrix(tokens, cols), tokens, cols);
    TestRows y(tokens, rows);
    cpu->linear(*cpu_stream, {layer.host_view(), nullptr}, x.host(), y.host(), {});
    cuda::linear(stream, {layer.device_view(), nullptr}, x.device(), y.device(), {},
                 Precision::tensor_cores);
    stream.synchronize();
    y.check_same(0);
  }
}

TEST("a token's product has the same bits whatever tokens are beside it") {
  RandomWeights random(4);
  TestStream stream;
  for (const DType dtype : kAllDTypes) {
    for (const Precision precision : {Precision::exact, Precision::tensor_cores}) {
      const Layer layer(71, 320, dtype, random);
      const std::size_t most = 70;
      TestRows x = random_rows(most, 320, random);
      // Few tokens share one kernel, many another.
      for (const auto& counts : {std::vector<std::size_t>{1, 2, 4, 7}, {9, 40, 70}}) {
        std::map<std::size_t, std::vector<float>> reference;  // by token
        for (const std::size_t count : counts) {
          for (const std::size_t first : {std::size_t{0}, most - count}) {
            TestRows y(count, 71);
            cuda::linear(stream, {layer.device_view(), nullptr}, x.device().slice(first, count),
                         y.device(), {}, precision);
            stream.synchronize();
            for (std::size_t t = 0; t < count; ++t) {
              CHECK(reference.try_emplace(first + t, y.row(t)).first->second == y.row(t));
            }
          }
        }
      }
    }
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("a product without its barriers is wrong, on tensor cores too") {
  RandomWeights random(5);
  TestStream stream;
  for (const Precision precision : {Precision::exact, Precision::tensor_cores}) {
    const Layer layer(70, 256, DType::bf16, random);
    TestRows x = random_rows(33, 256, random);
    TestRows y(33, 70);
    const auto run = [&] {
      cuda::linear(stream, {layer.device_view(), nullptr}, x.device(), y.device(), {}, precision);
      stream.synchronize();
      std::vector<float> all;
      for (std::size_t t = 0; t < 33; ++t) {
        const auto row = y.row(t);
        all.insert(all.end(), row.begin(), row.end());
      }
      return all;
    };
    for (const int barrier : {0, 1, 2}) check_needs_barrier(barrier, run);
  }
}
#endif

TEST("products of matrices that do not fit are refused") {
  TestStream stream;
  RandomWeights random(6);
  const Layer layer(8, 96, DType::f32, random);
  TestRows narrow(1, 64);
  TestRows x(1, 96);
  TestRows y(1, 8);
  const LinearWeights weights{layer.device_view(), nullptr};
  CHECK_THROWS(InvalidArgument,
               cuda::linear(stream, weights, narrow.device(), y.device(), {}, Precision::exact),
               "96", "64");
  Activations unaligned = x.device();
  unaligned.pitch = 97;
  CHECK_THROWS(InvalidArgument,
               cuda::linear(stream, weights, unaligned, y.device(), {}, Precision::exact), "97",
               "multiple of 4");
}

}  // namespace moerun::test
