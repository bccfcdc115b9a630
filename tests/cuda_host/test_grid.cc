// The harness runs kernels as a device does, and notices when they are wrong.
#include <numeric>
#include <set>
#include <vector>

#include "base/error.h"
#include "check.h"
#include "kernels/intrinsics.h"

namespace moerun::test {
namespace {

using cuda_host::Grid;
using cuda_host::run_grid;
using namespace moerun::cuda;

// Each block reverses its numbers through shared memory.
void reverse(const std::vector<int>& in, std::vector<int>& out) {
  int* tile = shared_memory<int>();
  const unsigned first = block_x() * num_threads();
  tile[thread_x()] = in[first + thread_x()];
  sync_block();
  out[first + thread_x()] = tile[num_threads() - 1 - thread_x()];
}

std::vector<int> reversed(const std::vector<int>& in, std::uint64_t seed) {
  std::vector<int> out(in.size());
  run_grid({{4, 1, 1}, {64, 1, 1}, 64 * sizeof(int)}, seed, [&] { reverse(in, out); });
  return out;
}

}  // namespace

TEST("threads of a block meet at barriers, and blocks have memory of their own") {
  std::vector<int> in(256);
  std::iota(in.begin(), in.end(), 1);
  std::vector<int> expected(256);
  for (std::size_t i = 0; i < 256; ++i) expected[i] = in[i / 64 * 64 + 63 - i % 64];
  for (std::uint64_t seed = 0; seed < 5; ++seed) CHECK(reversed(in, seed) == expected);
}

TEST("a kernel without its barrier gives a wrong answer") {
  std::vector<int> in(256);
  std::iota(in.begin(), in.end(), 1);
  const auto expected = reversed(in, 0);
  cuda_host::set_broken_barrier(0);
  std::size_t num_wrong = 0;
  for (std::uint64_t seed = 0; seed < 10; ++seed) num_wrong += reversed(in, seed) != expected;
  cuda_host::set_broken_barrier(-1);
  CHECK_EQ(num_wrong, std::size_t{10});
}

TEST("lanes of a warp exchange numbers, and sum them in one order") {
  std::vector<float> sums(64);
  std::vector<unsigned> votes(64);
  std::vector<unsigned> got(64);
  run_grid({{1, 1, 1}, {64, 1, 1}, 0}, 3, [&] {
    const unsigned i = thread_x();
    sums[i] = sum_over_warp(0.1f * static_cast<float>(i));
    votes[i] = ballot(i % 3 == 0);
    got[i] = shuffle(i, (lane() + 5) % 32);
    sync_warp();
    CHECK_EQ(shuffle_xor(i, 1), i ^ 1u);
  });
  for (unsigned i = 0; i < 64; ++i) {
    CHECK_EQ(sums[i], sums[i / 32 * 32]);
    unsigned expected = 0;
    for (unsigned bit = 0; bit < 32; ++bit) expected |= ((i / 32 * 32 + bit) % 3 == 0) << bit;
    CHECK_EQ(votes[i], expected);
    CHECK_EQ(got[i], i / 32 * 32 + (i % 32 + 5) % 32);
  }
  CHECK(std::abs(sums[0] - 49.6f) < 1e-4f);
}

TEST("every thread of every block runs once") {
  std::set<std::vector<unsigned>> seen;
  run_grid({{3, 2, 2}, {32, 1, 1}, 0}, 1,
           [&] { CHECK(seen.insert({block_x(), block_y(), block_z(), thread_x()}).second); });
  CHECK_EQ(seen.size(), std::size_t{3 * 2 * 2 * 32});
}

TEST("copies to shared memory land when they are waited for, not before") {
  const std::vector<std::uint32_t> source = {1, 2, 3, 4, 5, 6, 7, 8};
  run_grid({{1, 1, 1}, {32, 1, 1}, 32}, 0, [&] {
    if (thread_x() == 0) {
      auto* tile = shared_memory<std::uint32_t>();
      copy_later(tile, source.data());
      commit_copies();
      copy_later(tile + 4, source.data() + 4);
      commit_copies();
      CHECK(tile[0] != 1);
      wait_for_copies<1>();
      CHECK_EQ(tile[3], 4u);
      CHECK(tile[4] != 5);
      wait_for_copies<0>();
      CHECK_EQ(tile[7], 8u);
    }
    sync_block();
    CHECK_EQ(shared_memory<std::uint32_t>()[7], 8u);
  });
}

TEST("matrix tiles are multiplied as the fragments of a warp say") {
  // a[i][k] = i + k / 4, b[k][j] = j - k / 2: exact in bf16.
  const auto a_of = [](unsigned i, unsigned k) {
    return static_cast<float>(i) + 0.25f * static_cast<float>(k);
  };
  const auto b_of = [](unsigned k, unsigned j) {
    return static_cast<float>(j) - 0.5f * static_cast<float>(k);
  };
  const auto pair = [](float low, float high) {
    return bits_of(low) >> 16 | (bits_of(high) >> 16 << 16);
  };
  run_grid({{1, 1, 1}, {32, 1, 1}, 0}, 2, [&] {
    const unsigned g = lane() / 4;
    const unsigned t = lane() % 4 * 2;
    const std::uint32_t a[4] = {
        pair(a_of(g, t), a_of(g, t + 1)), pair(a_of(g + 8, t), a_of(g + 8, t + 1)),
        pair(a_of(g, t + 8), a_of(g, t + 9)), pair(a_of(g + 8, t + 8), a_of(g + 8, t + 9))};
    const std::uint32_t b[2] = {pair(b_of(t, g), b_of(t + 1, g)),
                                pair(b_of(t + 8, g), b_of(t + 9, g))};
    float d[4] = {1, 1, 1, 1};
    multiply_tiles_bf16(d, a, b);
    for (unsigned i = 0; i < 4; ++i) {
      float expected = 1;
      for (unsigned k = 0; k < 16; ++k) expected += a_of(g + i / 2 * 8, k) * b_of(k, t + i % 2);
      CHECK_EQ(d[i], expected);
    }
  });
}

TEST("matrix tiles in tf32 are multiplied as the fragments of a warp say") {
  // Exact in tf32; what a number has below that is cut off.
  const auto a_of = [](unsigned i, unsigned k) { return 1.0f + static_cast<float>(i * 8 + k); };
  const auto b_of = [](unsigned k, unsigned j) { return static_cast<float>(j * 8 + k) / 64.0f; };
  run_grid({{1, 1, 1}, {32, 1, 1}, 0}, 3, [&] {
    const unsigned g = lane() / 4;
    const unsigned t = lane() % 4;
    const std::uint32_t a[4] = {bits_of(a_of(g, t)) + 0x1fff, bits_of(a_of(g + 8, t)),
                                bits_of(a_of(g, t + 4)), bits_of(a_of(g + 8, t + 4))};
    const std::uint32_t b[2] = {bits_of(b_of(t, g)), bits_of(b_of(t + 4, g))};
    float d[4] = {1, 1, 1, 1};
    multiply_tiles_tf32(d, a, b);
    for (unsigned i = 0; i < 4; ++i) {
      float expected = 1;
      for (unsigned k = 0; k < 8; ++k) {
        expected += a_of(g + i / 2 * 8, k) * b_of(k, t * 2 + i % 2);
      }
      CHECK_EQ(d[i], expected);
    }
  });
}

TEST("numbers are rounded to tf32, to the nearest and of two to the larger one") {
  const auto rounded = [](float value) { return float_of(round_to_tf32(value)); };
  CHECK_EQ(rounded(1.0f + 0x1p-11f), 1.0f + 0x1p-10f);
  CHECK_EQ(rounded(1.0f + 0x1.fp-12f), 1.0f);
  CHECK_EQ(rounded(-1.0f - 0x1p-11f), -1.0f - 0x1p-10f);
  CHECK_EQ(rounded(3.4028e38f), INFINITY);
  CHECK_EQ(rounded(-INFINITY), -INFINITY);
  CHECK(std::isnan(rounded(NAN)));
  CHECK(std::isnan(rounded(float_of(0x7fffffffu))));
}

TEST("numbers are rounded to bf16 in pairs, to the nearest and of two to the even one") {
  CHECK_EQ(pack_bf16(1.0f, -2.0f), 0xc0003f80u);
  CHECK_EQ(pack_bf16(1.00390625f, 1.01171875f), 0x3f823f80u);  // halfway: down, up
  CHECK_EQ(pack_bf16(1.00391f, 3.4e38f), 0x7f803f81u);
  CHECK_EQ(pack_bf16(NAN, 0.0f) & 0x7fffu, 0x7fffu);
  CHECK_EQ(float_of(pack_bf16(0.0f, -1.5f)), -1.5f);
}

TEST("bits are counted, and read as a number") {
  CHECK_EQ(count_bits(0), 0u);
  CHECK_EQ(count_bits(0x80000101u), 3u);
  CHECK_EQ(float_of(bits_of(-1.5f)), -1.5f);
  prefetch_l2(nullptr);  // asks, and never fails
}

TEST("threads that wait for others in vain are reported") {
  CHECK_THROWS(Error,
               run_grid({{1, 1, 1}, {64, 1, 1}, 0}, 0,
                        [] {
                          if (thread_x() < 32) sync_warp();
                          if (thread_x() == 3) sum_over_warp(1);
                        }),
               "thread (3, 0, 0)", "in a warp");
  CHECK_THROWS(Error,
               run_grid({{1, 1, 1}, {32, 1, 1}, 0}, 0,
                        [] {
                          if (thread_x() == 5) {
                            sync_block();
                          } else {
                            sync_warp();
                          }
                        }),
               "do not come");
  CHECK_THROWS(Error,
               run_grid({{1, 1, 1}, {32, 1, 1}, 0}, 0,
                        [] {
                          if (thread_x() == 5) {
                            ballot(true);
                          } else {
                            sync_warp();
                          }
                        }),
               "another operation");
}

TEST("writes outside of shared memory, failures and impossible launches are reported") {
  CHECK_THROWS(Error,
               run_grid({{1, 1, 1}, {32, 1, 1}, 16}, 0,
                        [] { shared_memory<std::uint32_t>()[thread_x() % 5] = 1; }),
               "outside of its 16 bytes");
  CHECK_THROWS(InvalidArgument,
               run_grid({{2, 1, 1}, {32, 1, 1}, 0}, 0,
                        [] {
                          if (thread_x() == 7) throw InvalidArgument("seven");
                        }),
               "seven");
  for (const Grid& grid : {Grid{{0, 1, 1}, {32, 1, 1}, 0}, Grid{{1, 1, 1}, {1056, 1, 1}, 0},
                           Grid{{1, 1, 1}, {33, 1, 1}, 0}, Grid{{1, 1, 1}, {32, 1, 1}, 1 << 20}}) {
    CHECK_THROWS(InvalidArgument, run_grid(grid, 0, [] {}), "not possible here");
  }
  CHECK_THROWS(Error, cuda_host::sync_block(), "outside of one");
}

}  // namespace moerun::test
