// Embedding, norms and rotary embedding against the CPU backend.
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/embed.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "on_device.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

constexpr std::size_t kHiddenSizes[] = {20, 96, 192, 2080, 5000};

struct Cpu {
  std::unique_ptr<Backend> backend = make_cpu_backend(1, "portable");
  std::unique_ptr<Stream> stream = backend->make_stream();
};

// What rotate_and_store works on, on the host and on the device.
struct RotaryCase {
  AttentionShape shape;
  std::size_t tokens;
  std::size_t capacity;
  TestRows qkv;
  TestRows keys;  // (num_kv_heads * capacity, head_dim)
  TestRows values;
  std::vector<float> inv_freq;
  std::vector<float> q_weight;
  std::vector<float> k_weight;

  static std::size_t cols_of(const AttentionShape& shape) {
    return (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
  }
  RotaryCase(const AttentionShape& of_shape, std::size_t num_tokens, RandomWeights& random)
      : shape(of_shape),
        tokens(num_tokens),
        capacity(num_tokens + 50),
        qkv(random.matrix(tokens, cols_of(shape)), tokens, cols_of(shape)),
        keys(shape.num_kv_heads * capacity, shape.head_dim),
        values(shape.num_kv_heads * capacity, shape.head_dim),
        q_weight(random.matrix(1, shape.num_heads * shape.head_dim)),
        k_weight(random.matrix(1, shape.num_kv_heads * shape.head_dim)) {
    for (std::size_t i = 0; i < shape.head_dim / 2; ++i) {
      inv_freq.push_back(
          std::pow(1e4f, -2 * static_cast<float>(i) / static_cast<float>(shape.head_dim)));
    }
  }

  KvLayer host_kv() { return {keys.host().data, values.host().data, capacity, keys.host().pitch}; }
  KvLayer device_kv() {
    return {keys.device().data, values.device().data, capacity, keys.device().pitch};
  }
};

}  // namespace

TEST("embeddings on the device are rows of the table, scaled") {
  Cpu cpu;
  TestStream stream;
  for (const DType dtype : kAllDTypes) {
    for (const std::size_t hidden : kHiddenSizes) {
      RandomWeights random(hidden);
      const std::size_t vocab = 33;
      const auto table = encode(random.matrix(vocab, hidden), dtype);
      const OnDevice<std::byte> device_table(table);
      const std::vector<std::int32_t> ids = {32, 0, 7, 7, 31};
      const OnDevice<std::int32_t> device_ids(ids);
      TestRows out(ids.size(), hidden);
      MatrixView view{table.data(), dtype, vocab, hidden, padded(hidden)};
      cpu.backend->embed(*cpu.stream, view, ids, 1.5f, out.host());
      view.data = device_table.data();
      cuda::embed(stream, view, device_ids.data(), 1.5f, out.device());
      stream.synchronize();
      out.check_same(0);
    }
  }
}

TEST("norms on the device agree with the CPU, also in place") {
  Cpu cpu;
  TestStream stream;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const std::size_t hidden : kHiddenSizes) {
      for (const std::size_t tokens : {1u, 5u}) {
        RandomWeights random(hidden + tokens);
        const auto weight = random.matrix(1, hidden);
        const auto bias = random.matrix(1, hidden);
        const OnDevice<float> device_weight(weight);
        const OnDevice<float> device_bias(bias);
        TestRows x(random.matrix(tokens, hidden), tokens, hidden);
        TestRows out(tokens, hidden);
        cpu.backend->norm(*cpu.stream, {kind, weight.data(), bias.data(), 1e-5f}, x.host(),
                          out.host());
        const NormWeights weights{kind, device_weight.data(), device_bias.data(), 1e-5f};
        cuda::norm(stream, weights, x.device(), out.device());
        stream.synchronize();
        out.check_same(1e-5);
        cuda::norm(stream, weights, x.device(), x.device());
        stream.synchronize();
        for (std::size_t t = 0; t < tokens; ++t) CHECK(x.row(t) == out.row(t));
      }
    }
  }
}

TEST("a norm after an addition writes the sum and its norm") {
  Cpu cpu;
  TestStream stream;
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    const std::size_t hidden = 200;
    const std::size_t tokens = 3;
    RandomWeights random(11);
    const auto weight = random.matrix(1, hidden);
    const OnDevice<float> device_weight(weight);
    TestRows x(random.matrix(tokens, hidden), tokens, hidden);
    TestRows delta(random.matrix(tokens, hidden), tokens, hidden);
    TestRows out(tokens, hidden);
    for (std::size_t i = 0; i < tokens * padded(hidden); ++i) {
      x.host().data[i] += delta.host().data[i];
    }
    cpu.backend->norm(*cpu.stream, {kind, weight.data(), nullptr, 1e-6f}, x.host(), out.host());
    cuda::add_norm(stream, {kind, device_weight.data(), nullptr, 1e-6f}, delta.device(), x.device(),
                   out.device());
    stream.synchronize();
    x.check_same(0);
    out.check_same(1e-5);
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("a norm without its barriers is wrong") {
  TestStream stream;
  RandomWeights random(5);
  const std::size_t hidden = 2080;
  const OnDevice<float> weight(random.matrix(1, hidden));
  TestRows x(random.matrix(1, hidden), 1, hidden);
  TestRows out(1, hidden);
  const NormWeights weights{NormKind::layer, weight.data(), nullptr, 1e-5f};
  for (const int barrier : {0, 1}) {
    check_needs_barrier(barrier, [&] {
      cuda::norm(stream, weights, x.device(), out.device());
      stream.synchronize();
      return out.row(0);
    });
  }
}
#endif

TEST("queries and keys are normalised, clamped, rotated and stored as on the CPU") {
  Cpu cpu;
  TestStream stream;
  enum class Norm { none, per_head, whole };
  for (const AttentionShape& shape :
       {AttentionShape{3, 1, 64}, AttentionShape{3, 3, 40}, AttentionShape{16, 2, 128}}) {
    for (const Norm norm : {Norm::none, Norm::per_head, Norm::whole}) {
      for (const float clip : {0.0f, 0.3f}) {
        RandomWeights random(shape.num_heads);
        RotaryCase one(shape, norm == Norm::none ? 17 : 2, random);
        const OnDevice<float> inv_freq(one.inv_freq);
        const OnDevice<float> q_weight(one.q_weight);
        const OnDevice<float> k_weight(one.k_weight);
        RotaryParams params;
        params.inv_freq = one.inv_freq.data();
        params.scale = 1.25f;
        params.norm_per_head = norm == Norm::per_head;
        params.clip = clip;
        if (norm != Norm::none) {
          params.q_norm = {NormKind::rms, one.q_weight.data(), nullptr, 1e-5f};
          params.k_norm = {NormKind::rms, one.k_weight.data(), nullptr, 1e-6f};
        }
        cpu.backend->rotate_and_store(*cpu.stream, shape, params, 33, one.qkv.host(),
                                      one.host_kv());
        params.inv_freq = inv_freq.data();
        if (norm != Norm::none) {
          params.q_norm.weight = q_weight.data();
          params.k_norm.weight = k_weight.data();
        }
        // What is not stored there stays as it was.
        for (TestRows* rows : {&one.keys, &one.values}) {
          for (std::size_t r = 0; r < rows->device().rows; ++r) {
            std::fill_n(rows->device().row(r), shape.head_dim, 0.0f);
          }
        }
        cuda::rotate_and_store(stream, shape, params, 33, one.qkv.device(), one.device_kv());
        stream.synchronize();
        one.qkv.check_same(1e-5);
        one.keys.check_same(1e-5);
        one.values.check_same(0);
      }
    }
  }
}

TEST("infinities in queries, keys and clamped values become NaN as on the CPU") {
  const AttentionShape shape{3, 1, 40};
  for (const float clip : {0.0f, 0.3f}) {
    Cpu cpu;
    TestStream stream;
    RandomWeights random(4);
    RotaryCase one(shape, 2, random);
    const std::size_t in_key = shape.num_heads * shape.head_dim + 7;
    const std::size_t in_value = in_key + shape.head_dim;
    for (const Activations& rows : {one.qkv.host(), one.qkv.device()}) {
      rows.row(0)[3] = rows.row(0)[in_key] = std::numeric_limits<float>::infinity();
      rows.row(1)[in_value] = -std::numeric_limits<float>::infinity();
    }
    const OnDevice<float> inv_freq(one.inv_freq);
    RotaryParams params;
    params.inv_freq = one.inv_freq.data();
    params.clip = clip;
    cpu.backend->rotate_and_store(*cpu.stream, shape, params, 5, one.qkv.host(), one.host_kv());
    params.inv_freq = inv_freq.data();
    cuda::rotate_and_store(stream, shape, params, 5, one.qkv.device(), one.device_kv());
    stream.synchronize();
    for (TestRows* rows : {&one.qkv, &one.keys, &one.values}) {
      const Activations& expected = rows->host();
      for (std::size_t r = 0; r < expected.rows; ++r) {
        const bool is_written = rows == &one.qkv || r == 5 || r == 6;
        for (std::size_t c = 0; is_written && c < expected.cols; ++c) {
          CHECK_EQ(std::isfinite(rows->device().row(r)[c]), std::isfinite(expected.row(r)[c]));
        }
      }
    }
    for (const Activations& rows : {one.qkv.host(), one.qkv.device()}) {
      for (const std::size_t c : {std::size_t{3}, std::size_t{23}, in_key, in_key + 20}) {
        CHECK(std::isnan(rows.row(0)[c]));
      }
      CHECK(!std::isfinite(rows.row(1)[in_value]));
    }
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("a rotation without its barriers is wrong") {
  TestStream stream;
  for (const bool per_head : {true, false}) {
    for (int barrier = 0; barrier < (per_head ? 1 : 3); ++barrier) {
      check_needs_barrier(barrier, [&] {
        RandomWeights random(8);
        RotaryCase one({3, 1, 64}, 1, random);
        const OnDevice<float> inv_freq(one.inv_freq);
        const OnDevice<float> q_weight(one.q_weight);
        const OnDevice<float> k_weight(one.k_weight);
        RotaryParams params;
        params.inv_freq = inv_freq.data();
        params.q_norm = {NormKind::rms, q_weight.data(), nullptr, 1e-5f};
        params.k_norm = {NormKind::rms, k_weight.data(), nullptr, 1e-5f};
        params.norm_per_head = per_head;
        cuda::rotate_and_store(stream, one.shape, params, 5, one.qkv.device(), one.device_kv());
        stream.synchronize();
        return one.qkv.row(0);
      });
    }
  }
}
#endif

TEST("shapes that do not fit the elementwise kernels are refused") {
  TestStream stream;
  TestRows x(1, 96);
  TestRows out(1, 64);
  CHECK_THROWS(InvalidArgument, cuda::norm(stream, {}, x.device(), out.device()), "96", "64");
  TestRows wide(1, 8224);
  CHECK_THROWS(InvalidArgument, cuda::norm(stream, {}, wide.device(), wide.device()), "8224",
               "8192 at most");
  const MatrixView table{nullptr, DType::f32, 4, 64, 65};
  CHECK_THROWS(InvalidArgument, cuda::embed(stream, table, nullptr, 1, out.device()), "65", "32");
  CHECK_THROWS(InvalidArgument,
               cuda::rotate_and_store(stream, {1, 1, 31}, {}, 0, x.device(), {{}, {}, 8, 32}),
               "heads of 31", "93");
  CHECK_THROWS(InvalidArgument,
               cuda::rotate_and_store(stream, {1, 1, 32}, {}, 8, x.device(), {{}, {}, 8, 32}),
               "position 8", "8 tokens");
}

}  // namespace moerun::test
