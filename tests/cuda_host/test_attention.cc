// Attention over the KV cache against the CPU backend.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "device/backend.h"
#include "kernels/attention.h"
#include "on_device.h"
#include "random_weights.h"

namespace moerun::test {
namespace {

// Queries of some tokens, and a KV cache that is filled up to the last of them.
class Case {
 public:
  Case(const AttentionShape& of_shape, std::size_t num_keys, std::size_t tokens, std::uint64_t seed)
      : Case(of_shape, num_keys, tokens, RandomWeights(seed)) {}

  AttentionShape shape;
  std::size_t first_position;
  TestRows qkv;
  TestRows out;
  AttentionParams params;

  void run_on_cpu() {
    const auto cpu = make_cpu_backend(1, "portable");
    const auto stream = cpu->make_stream();
    cpu->attention(*stream, shape, params, first_position, qkv.host(),
                   kv(keys_.host(), values_.host()), out.host());
  }
  // Tokens [first, first + count) of the case.
  void run_on_device(std::size_t first, std::size_t count) {
    TestStream stream;
    const std::size_t bytes = cuda::attention_scratch_bytes(shape, count, capacity_);
    const OnDevice<float> scratch(bytes / sizeof(float));
    cuda::attention(stream, shape, params, first_position + first, qkv.device().slice(first, count),
                    kv(keys_.device(), values_.device()), out.device().slice(first, count),
                    scratch.data(), bytes);
    stream.synchronize();
  }
  // The last token, whose position the kernels find on the device; `largest`: it may be there.
  void run_with_position_on_device(std::size_t largest) {
    TestStream stream;
    const OnDevice<std::int32_t> position(std::size_t{1});
    position.data()[0] = static_cast<std::int32_t>(first_position);
    const std::size_t bytes = cuda::attention_scratch_bytes(shape, 1, largest + 1);
    const OnDevice<float> scratch(bytes / sizeof(float));
    KvLayer cache = device_kv();
    cuda::attention(stream, shape, params, Position(largest, position.data()), qkv.device(), cache,
                    out.device(), scratch.data(), bytes);
    stream.synchronize();
  }
  void check(double tolerance) {
    run_on_cpu();
    run_on_device(0, qkv.host().rows);
    out.check_same(tolerance);
  }
  // Of the first KV head.
  void set_key(std::size_t key, float value) {
    for (const Activations& rows : {keys_.host(), keys_.device()}) rows.row(key)[1] = value;
  }
  void scale_all(float factor) {
    for (TestRows* part : {&qkv, &keys_, &values_}) {
      for (const Activations& rows : {part->host(), part->device()}) {
        for (std::size_t i = 0; i < rows.rows * rows.pitch; ++i) rows.data[i] *= factor;
      }
    }
  }
  KvLayer device_kv() { return kv(keys_.device(), values_.device()); }

 private:
  Case(const AttentionShape& of_shape, std::size_t num_keys, std::size_t tokens,
       RandomWeights random)
      : shape(of_shape),
        first_position(num_keys - tokens),
        qkv(random.matrix(tokens, cols_of(shape)), tokens, cols_of(shape)),
        out(tokens, shape.num_heads * shape.head_dim),
        capacity_(num_keys + 3),
        keys_(rows(random), shape.num_kv_heads * capacity_, shape.head_dim),
        values_(rows(random), shape.num_kv_heads * capacity_, shape.head_dim) {
    params.scale = 3 / std::sqrt(static_cast<float>(shape.head_dim));
    // Nobody has written behind the last position.
    for (std::size_t h = 0; h < shape.num_kv_heads; ++h) {
      for (std::size_t key = num_keys; key < capacity_; ++key) {
        for (TestRows* part : {&keys_, &values_}) {
          std::fill_n(part->device().row(h * capacity_ + key), shape.head_dim,
                      std::numeric_limits<float>::quiet_NaN());
        }
      }
    }
  }
  static std::size_t cols_of(const AttentionShape& of) {
    return (of.num_heads + 2 * of.num_kv_heads) * of.head_dim;
  }
  std::vector<float> rows(RandomWeights& random) const {
    return random.matrix(shape.num_kv_heads * capacity_, shape.head_dim);
  }
  KvLayer kv(const Activations& keys, const Activations& values) const {
    return {keys.data, values.data, capacity_, keys.pitch};
  }

  std::size_t capacity_;
  TestRows keys_;
  TestRows values_;
};

constexpr AttentionShape kShapes[] = {{3, 1, 64}, {3, 3, 40}, {2, 1, 128}, {9, 1, 20}, {2, 2, 256}};

}  // namespace

TEST("one token attends to any number of keys as on the CPU") {
  for (const AttentionShape& shape : kShapes) {
    for (const std::size_t num_keys : {1u, 2u, 17u, 63u, 64u, 65u, 300u}) {
      Case one(shape, num_keys, 1, num_keys);
      one.check(1e-5);
      for (const std::size_t window : {1u, 50u, 130u}) {
        one.params.window = window;
        one.check(1e-5);
      }
    }
  }
}

TEST("a key that is no number leaves no number to those that see it") {
  constexpr AttentionShape kShape{4, 2, 32};  // two heads share a KV head
  for (const bool may_round : {false, true}) {
    for (const std::size_t tokens : {1u, 70u}) {
      for (const std::size_t bad : {0u, 31u, 40u, 130u}) {
        Case one(kShape, 200, tokens, 5);
        one.params.may_round = may_round;
        // A tile of NaN alone, too.
        for (std::size_t key = bad; key < std::min<std::size_t>(bad + 32, 140); ++key) {
          one.set_key(key, std::numeric_limits<float>::quiet_NaN());
        }
        one.run_on_cpu();
        one.run_on_device(0, tokens);
        for (const Activations& out : {one.out.host(), one.out.device()}) {
          for (std::size_t t = 0; t < tokens; ++t) {
            const bool sees = 200 - tokens + t >= bad;
            for (std::size_t i = 0; i < 2 * kShape.head_dim; ++i) {
              CHECK_EQ(std::isnan(out.row(t)[i]), sees);
              CHECK(std::isfinite(out.row(t)[2 * kShape.head_dim + i]));
            }
          }
        }
      }
    }
  }
}

TEST("splits of many keys hold more than one tile") {
  Case one({4, 2, 32}, 64 * 64 + 70, 1, 2);
  one.check(1e-5);
}

TEST("several tokens attend to the tokens before them as on the CPU") {
  for (const AttentionShape& shape : kShapes) {
    for (const std::size_t tokens : {2u, 5u, 17u, 40u}) {
      for (const std::size_t before : {0u, 3u, 70u}) {
        Case one(shape, before + tokens, tokens, tokens);
        one.check(1e-5);
        one.params.window = 10;
        one.check(1e-5);
      }
    }
  }
}

TEST("on tensor cores several tokens attend to the tokens before them as on the CPU") {
  constexpr AttentionShape kMore[] = {{3, 1, 64}, {3, 3, 40}, {2, 1, 128}, {9, 1, 20}, {4, 2, 96}};
  for (const AttentionShape& shape : kMore) {
    for (const std::size_t tokens : {2u, 17u, 40u}) {
      for (const std::size_t before : {0u, 3u, 70u}) {
        Case one(shape, before + tokens, tokens, tokens);
        one.params.may_round = true;
        one.check(1e-3);
        one.params.window = 10;
        one.check(1e-3);
      }
    }
  }
  Case widest({2, 2, 256}, 50, 35, 1);
  widest.params.may_round = true;
  widest.check(1e-3);
  Case wide({2, 1, 132}, 45, 5, 2);
  wide.params.may_round = true;
  wide.params.window = 12;
  wide.check(1e-3);
}

TEST("large scores do not overflow, wherever the largest stands") {
  for (const std::size_t tokens : {1u, 5u}) {
    Case one({3, 1, 64}, 200, tokens, 9);
    one.params.scale = 40;
    one.check(1e-4);
    one.params.may_round = true;  // here of numbers that tf32 holds
    one.check(tokens == 1 ? 1e-4 : 1e-2);
  }
}

TEST("on tensor cores attention takes numbers that f16 does not hold") {
  Case one({2, 1, 64}, 30, 9, 10);
  one.params.may_round = true;
  one.scale_all(3e5f);
  one.params.scale /= 9e10f;
  one.check(1e-3);
}

TEST("a token's attention has the same bits in every chunk and any order of blocks") {
  struct Setting {
    std::size_t window;
    bool may_round;
  };
  for (const auto& [window, may_round] :
       {Setting{0, false}, Setting{20, false}, Setting{0, true}, Setting{20, true}}) {
    Case one({6, 2, 64}, 90, 70, 3);
    one.params.window = window;
    one.params.may_round = may_round;
    one.run_on_device(0, 70);
    std::vector<std::vector<float>> whole;
    for (std::size_t t = 0; t < 70; ++t) whole.push_back(one.out.row(t));
    for (const std::size_t chunk : {may_round ? 5u : 2u, 14u, 35u}) {
      set_order(Order::random, chunk);
      for (std::size_t first = 0; first < 70; first += chunk) one.run_on_device(first, chunk);
      for (std::size_t t = 0; t < 70; ++t) CHECK(one.out.row(t) == whole[t]);
    }
  }
  // One token alone, split over blocks.
  Case one({8, 1, 64}, 700, 1, 4);
  one.run_on_device(0, 1);
  const auto first = one.out.row(0);
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    set_order(Order::random, seed);
    one.run_on_device(0, 1);
    CHECK(one.out.row(0) == first);
  }
}

#if defined(MOERUN_CUDA_HOST)
TEST("attention without its barriers is wrong") {
  struct Broken {
    std::size_t tokens;
    int num_barriers;
    bool may_round;
  };
  // Of several tokens the third one keeps copies from landing too early, which they never do here.
  for (const auto& [tokens, num_barriers, may_round] :
       {Broken{1, 3, false}, Broken{20, 2, false}, Broken{20, 2, true}}) {
    Case one({2, 1, 64}, may_round ? 60 : 300, tokens, 5);
    one.params.may_round = may_round;
    for (int barrier = 0; barrier < num_barriers; ++barrier) {
      check_needs_barrier(barrier, [&, count = tokens] {
        one.run_on_device(0, count);
        return one.out.row(0);
      });
    }
  }
}
#endif

TEST("attention refuses what its kernels do not hold") {
  TestStream stream;
  Case one({2, 1, 64}, 90, 1, 6);
  const KvLayer kv = one.device_kv();
  const auto run = [&](const AttentionShape& shape, std::size_t position, std::size_t bytes) {
    cuda::attention(stream, shape, {}, position, one.qkv.device(), kv, one.out.device(), nullptr,
                    bytes);
  };
  CHECK_THROWS(InvalidArgument, run({1, 1, 260}, 0, 0), "260", "256");
  CHECK_THROWS(InvalidArgument, run({1, 1, 30}, 0, 0), "30", "multiples of 4");
  CHECK_THROWS(InvalidArgument, run({3, 2, 64}, 0, 0), "3 heads", "2 KV heads");
  CHECK_THROWS(InvalidArgument, run({2, 1, 64}, 93, 0), "position 93", "93 tokens");
  const std::size_t needed = cuda::attention_scratch_bytes({2, 1, 64}, 1, 90);
  CHECK_THROWS(InvalidArgument, run({2, 1, 64}, 89, needed - 1), "position 89",
               std::to_string(needed));
}

TEST("a position that lies on the device gives the same bits") {
  for (const std::size_t num_keys : {1u, 64u, 65u, 130u, 500u, 4094u}) {
    for (const std::size_t window : {0u, 100u}) {
      Case c(kShapes[1], num_keys, 1, num_keys);
      c.params.window = window;
      c.run_on_device(0, 1);
      const auto expected = c.out.row(0);
      for (const std::size_t more : {0u, 2u}) {
        c.run_with_position_on_device(num_keys - 1 + more);
        CHECK(c.out.row(0) == expected);
      }
    }
  }
}

}  // namespace moerun::test
