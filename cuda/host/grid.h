// Runs a kernel on the host: a grid of blocks one after the other, a fibre for each thread of one.
//
// Threads of a block run in any order between two points where they wait for each other, here in an
// order that changes from one such point to the next: what is missing a barrier gives wrong
// results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace moerun::cuda_host {

inline constexpr unsigned kWarpSize = 32;

struct Index3 {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

struct Grid {
  Index3 blocks{1, 1, 1};
  Index3 threads{1, 1, 1};       // of a block
  std::size_t shared_bytes = 0;  // of a block
};

// Limits of the devices that are stood in for: those of compute capability 8.0.
inline constexpr std::size_t kMaxThreads = 1024;
inline constexpr std::size_t kMaxSharedBytes = 163 * 1024;

// Runs `kernel` in every thread. `seed` decides about the order of blocks and threads. Throws what
// a thread throws, and Error where threads wait for others that will never come, use different
// operations of a warp at the same time, or write outside of their shared memory.
void run_grid(const Grid& grid, std::uint64_t seed, const std::function<void()>& kernel);

// The rest is for the code of kernels, in the thread that calls it.
Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
std::byte* shared_memory();
void sync_block();

// Which operation of a warp a thread has come to. All 32 lanes must come to the same one: kernels
// here use no other masks.
enum class WarpOperation { sync, shuffle, vote, matrix };
inline constexpr std::size_t kExchangeBytes = 64;

// Hands `bytes` (at most 64) of every lane to every other: returns those of lane 0, 1, ...,
// kExchangeBytes apart. Valid until the lane's next operation.
const std::byte* exchange(WarpOperation operation, const void* data, std::size_t bytes);

// Copies on their way from global to shared memory; they land when they are waited for.
void copy_later(void* destination, const void* source, std::size_t bytes);
void commit_copies();
void wait_for_copies(unsigned num_groups_left);

// For tests that show that the harness can fail: the n-th barrier of a block (from 0) lets
// everybody pass. -1: none does.
void set_broken_barrier(int number);

}  // namespace moerun::cuda_host
