#include "host/grid.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "host/fibre.h"

namespace moerun::cuda_host {
namespace {

constexpr std::size_t kCanaryBytes = 256;
constexpr std::byte kCanary{0xc5};
// What a kernel finds in shared memory that it has not written: a signalling NaN.
constexpr std::byte kUnwritten{0x7f};

enum class Waiting { no, at_barrier, in_warp };

struct PendingCopy {
  void* destination;
  const void* source;
  std::size_t bytes;
};

struct Thread {
  Fibre fibre;
  Index3 index;
  unsigned lane = 0;
  std::size_t warp = 0;
  Waiting waiting = Waiting::no;
  int num_barriers = 0;
  std::vector<PendingCopy> open_copies;
  std::deque<std::vector<PendingCopy>> groups;
};

struct Warp {
  unsigned num_arrived = 0;  // at the current operation
  unsigned num_done = 0;     // operations
  WarpOperation operation = WarpOperation::sync;
  // By turns, so that a lane can write for the next operation while others still read.
  std::array<std::array<std::byte, kExchangeBytes * kWarpSize>, 2> data;
};

struct Block {
  Grid grid;
  Index3 index;
  std::vector<std::byte> shared;
  std::vector<Warp> warps;
  std::size_t num_running = 0;  // threads that have not ended
  std::size_t num_at_barrier = 0;
};

// Fibres are kept from launch to launch: their stacks are what costs.
std::vector<std::unique_ptr<Thread>>& threads() {
  static thread_local std::vector<std::unique_ptr<Thread>> all;
  return all;
}
thread_local Block* current_block = nullptr;
thread_local Thread* current_thread = nullptr;
thread_local int broken_barrier = -1;

Block& block() {
  if (current_block == nullptr) throw Error("an operation of a kernel was used outside of one");
  return *current_block;
}

void land(const PendingCopy& copy) { std::memcpy(copy.destination, copy.source, copy.bytes); }

void release_barrier(std::span<const std::unique_ptr<Thread>> active, Block& all) {
  all.num_at_barrier = 0;
  for (const auto& thread : active) {
    if (thread->waiting == Waiting::at_barrier) thread->waiting = Waiting::no;
  }
}

std::string name_of(const Thread& thread) {
  return message("thread (", thread.index.x, ", ", thread.index.y, ", ", thread.index.z, ")");
}

void check_canaries(const Block& all) {
  const auto is_intact = [&](std::size_t first) {
    return std::all_of(all.shared.begin() + static_cast<std::ptrdiff_t>(first),
                       all.shared.begin() + static_cast<std::ptrdiff_t>(first + kCanaryBytes),
                       [](std::byte b) { return b == kCanary; });
  };
  if (!is_intact(0) || !is_intact(kCanaryBytes + all.grid.shared_bytes)) {
    throw Error(message("block (", all.index.x, ", ", all.index.y, ", ", all.index.z,
                        ") wrote outside of its ", all.grid.shared_bytes,
                        " bytes of shared memory"));
  }
}

void prepare(Block& all, const std::function<void()>& kernel, std::size_t num_threads) {
  auto& pool = threads();
  while (pool.size() < num_threads) pool.push_back(std::make_unique<Thread>());
  all.warps.assign((num_threads + kWarpSize - 1) / kWarpSize, {});
  all.num_running = num_threads;
  all.num_at_barrier = 0;
  std::fill(all.shared.begin(), all.shared.end(), kUnwritten);
  std::fill_n(all.shared.begin(), kCanaryBytes, kCanary);
  std::fill_n(all.shared.end() - kCanaryBytes, kCanaryBytes, kCanary);
  const Index3 size = all.grid.threads;
  for (std::size_t i = 0; i < num_threads; ++i) {
    Thread& thread = *pool[i];
    thread.index = {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
                    static_cast<unsigned>(i / size.x / size.y)};
    thread.lane = static_cast<unsigned>(i % kWarpSize);
    thread.warp = i / kWarpSize;
    thread.waiting = Waiting::no;
    thread.num_barriers = 0;
    thread.open_copies.clear();
    thread.groups.clear();
    thread.fibre.start(kernel);
  }
}

void run_block(Block& all, std::mt19937_64& random, const std::function<void()>& kernel) {
  const std::size_t num_threads =
      std::size_t{all.grid.threads.x} * all.grid.threads.y * all.grid.threads.z;
  prepare(all, kernel, num_threads);
  const std::span<const std::unique_ptr<Thread>> active(threads().data(), num_threads);
  std::vector<std::size_t> order(num_threads);
  std::iota(order.begin(), order.end(), std::size_t{0});
  while (all.num_running != 0) {
    // Forwards, backwards, or from somewhere in the middle.
    std::rotate(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(random() % num_threads),
                order.end());
    if (random() % 2 == 0) std::reverse(order.begin(), order.end());
    bool has_moved = false;
    for (const std::size_t i : order) {
      Thread& thread = *active[i];
      if (thread.fibre.has_ended() || thread.waiting != Waiting::no) continue;
      has_moved = true;
      current_thread = &thread;
      thread.fibre.resume();
      if (thread.fibre.has_ended()) {
        --all.num_running;
        for (const auto& group : thread.groups) std::for_each(group.begin(), group.end(), land);
      }
    }
    if (all.num_at_barrier != 0 && all.num_at_barrier == all.num_running) {
      release_barrier(active, all);
      has_moved = true;
    }
    if (has_moved) continue;
    const auto stuck = std::find_if(active.begin(), active.end(),
                                    [](const auto& thread) { return !thread->fibre.has_ended(); });
    throw Error(message(name_of(**stuck), " waits ",
                        (*stuck)->waiting == Waiting::at_barrier ? "at a barrier" : "in a warp",
                        " for threads that do not come"));
  }
  check_canaries(all);
}

}  // namespace

void run_grid(const Grid& grid, std::uint64_t seed, const std::function<void()>& kernel) {
  const std::size_t num_threads = std::size_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  const std::size_t num_blocks = std::size_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  if (num_threads == 0 || num_threads > kMaxThreads || num_blocks == 0 ||
      num_threads % kWarpSize != 0 || grid.shared_bytes > kMaxSharedBytes ||
      grid.blocks.y > 65535 || grid.blocks.z > 65535) {
    throw InvalidArgument(message("a launch of ", num_blocks, " blocks of ", num_threads,
                                  " threads with ", grid.shared_bytes,
                                  " bytes of shared memory is not possible here"));
  }
  std::mt19937_64 random(seed);
  Block all;
  all.grid = grid;
  all.shared.resize(grid.shared_bytes + 2 * kCanaryBytes);
  std::vector<std::size_t> order(num_blocks);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  struct Current {
    Block* before = current_block;
    Thread* thread_before = current_thread;
    ~Current() {
      current_block = before;
      current_thread = thread_before;
    }
  } const restore_at_end;
  current_block = &all;
  for (const std::size_t i : order) {
    all.index = {static_cast<unsigned>(i % grid.blocks.x),
                 static_cast<unsigned>(i / grid.blocks.x % grid.blocks.y),
                 static_cast<unsigned>(i / grid.blocks.x / grid.blocks.y)};
    run_block(all, random, kernel);
  }
}

Index3 thread_index() { return current_thread->index; }
Index3 block_index() { return block().index; }
Index3 block_size() { return block().grid.threads; }
Index3 grid_size() { return block().grid.blocks; }
std::byte* shared_memory() { return block().shared.data() + kCanaryBytes; }

void sync_block() {
  Block& all = block();
  Thread& self = *current_thread;
  if (self.num_barriers++ == broken_barrier) return;
  self.waiting = Waiting::at_barrier;
  ++all.num_at_barrier;
  self.fibre.pause();
}

const std::byte* exchange(WarpOperation operation, const void* data, std::size_t bytes) {
  Block& all = block();
  Thread& self = *current_thread;
  Warp& warp = all.warps[self.warp];
  if (bytes > kExchangeBytes) throw Error("too much is exchanged in a warp");
  if (warp.num_arrived == 0) warp.operation = operation;
  if (warp.operation != operation) {
    throw Error(name_of(self) + " is at another operation of its warp than the threads before");
  }
  std::byte* buffer = warp.data[warp.num_done % 2].data();
  if (bytes != 0) std::memcpy(buffer + self.lane * kExchangeBytes, data, bytes);
  if (++warp.num_arrived != kWarpSize) {
    self.waiting = Waiting::in_warp;
    self.fibre.pause();
    return buffer;
  }
  // The last one lets the others go.
  warp.num_arrived = 0;
  ++warp.num_done;
  for (std::size_t i = 0; i < kWarpSize; ++i) {
    threads()[self.warp * kWarpSize + i]->waiting = Waiting::no;
  }
  return buffer;
}

void copy_later(void* destination, const void* source, std::size_t bytes) {
  current_thread->open_copies.push_back({destination, source, bytes});
}

void commit_copies() {
  Thread& self = *current_thread;
  self.groups.push_back(std::move(self.open_copies));
  self.open_copies.clear();
}

void wait_for_copies(unsigned num_groups_left) {
  Thread& self = *current_thread;
  while (self.groups.size() > num_groups_left) {
    std::for_each(self.groups.front().begin(), self.groups.front().end(), land);
    self.groups.pop_front();
  }
}

void set_broken_barrier(int number) { broken_barrier = number; }

}  // namespace moerun::cuda_host
