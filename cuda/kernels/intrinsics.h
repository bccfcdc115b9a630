// What kernels use of a device, by one name whether they are compiled for it or for the host.
//
// Kernels take their arguments in one struct, are called launch<kernel>(grid, stream, arguments),
// use dynamic shared memory only, blocks of whole warps, and no divergent warp operations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"

#if defined(__CUDACC__)
#define MOERUN_DEVICE __device__ __forceinline__
#define MOERUN_HOST_DEVICE __host__ __device__ inline
#define MOERUN_KERNEL __global__ void
#define MOERUN_UNROLL _Pragma("unroll")
// After MOERUN_KERNEL: registers for so many blocks of so many threads a multiprocessor.
#define MOERUN_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// Of a kernel's parameter: its arrays are indexed where they are, not in a copy of each thread's.
#define MOERUN_IN_PLACE __grid_constant__
#else
#include <algorithm>
#include <cmath>
#include <cstring>

#include "host/grid.h"
#define MOERUN_DEVICE inline
#define MOERUN_HOST_DEVICE inline
#define MOERUN_KERNEL inline void
#define MOERUN_UNROLL
#define MOERUN_BOUNDS(threads, blocks)
#define MOERUN_IN_PLACE
#endif

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kWarpSize = 32;

// Sixteen bytes, which one thread loads or stores at once.
struct alignas(16) Pack16 {
  std::uint32_t words[4];
};

#if defined(__CUDACC__)

MOERUN_DEVICE unsigned thread_x() { return threadIdx.x; }
MOERUN_DEVICE unsigned block_x() { return blockIdx.x; }
MOERUN_DEVICE unsigned block_y() { return blockIdx.y; }
MOERUN_DEVICE unsigned block_z() { return blockIdx.z; }
MOERUN_DEVICE unsigned num_threads() { return blockDim.x; }
MOERUN_DEVICE unsigned num_blocks_x() { return gridDim.x; }

template <typename T>
MOERUN_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char moerun_shared[];
  return reinterpret_cast<T*>(moerun_shared);
}

MOERUN_DEVICE void sync_block() { __syncthreads(); }
MOERUN_DEVICE void sync_warp() { __syncwarp(); }
template <typename T>
MOERUN_DEVICE T shuffle(T value, unsigned lane) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
}
template <typename T>
MOERUN_DEVICE T shuffle_xor(T value, unsigned mask) {
  return __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask));
}
MOERUN_DEVICE unsigned ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

// Read once, not to be kept in a cache.
MOERUN_DEVICE Pack16 load_once(const void* address) {
  Pack16 pack;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(pack.words[0]), "=r"(pack.words[1]), "=r"(pack.words[2]), "=r"(pack.words[3])
               : "l"(address));
  return pack;
}

// Copies of 16 bytes to shared memory that go on while the thread does; wait_for_copies(n) leaves n
// committed groups under way.
MOERUN_DEVICE void copy_later(void* shared, const void* global) {
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}
MOERUN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <unsigned kGroupsLeft>
MOERUN_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// What another block has written, past this block's own cache.
MOERUN_DEVICE float load_fresh(const float* address) { return __ldcg(address); }
// What the thread wrote before it is seen by other blocks, or by the host, no later than what it
// writes after it.
MOERUN_DEVICE void fence_for_device() { __threadfence(); }
MOERUN_DEVICE void fence_for_host() { __threadfence_system(); }
MOERUN_DEVICE void store_for_host(std::uint32_t* address, std::uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
// Returns what was there.
MOERUN_DEVICE std::uint32_t add_atomically(std::uint32_t* address, std::uint32_t value) {
  return atomicAdd(address, value);
}

MOERUN_DEVICE float to_float_f16(std::uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
MOERUN_DEVICE float to_float_bf16(std::uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
MOERUN_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
MOERUN_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
MOERUN_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Two numbers rounded to bf16 (to the nearest, of two the even one), `low` in the low half.
MOERUN_DEVICE std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Rounded to tf32 (11 bits, to the nearest, of two the larger one), as bits of a float.
MOERUN_DEVICE std::uint32_t round_to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
// Asks for the memory around an address, to be in the L2 cache soon.
MOERUN_DEVICE void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
MOERUN_DEVICE unsigned count_bits(std::uint32_t bits) {
  return static_cast<unsigned>(__popc(bits));
}

// d += a b for tiles of 16 x 16 and 16 x 8 numbers in bf16, d in float32, spread over the warp as
// PTX ISA, "Matrix Fragments for mma.m16n8k16", says.
MOERUN_DEVICE void multiply_tiles_bf16(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for tiles of 16 x 8 and 8 x 8 numbers in tf32: lane (g, t) = (lane / 4, lane % 4) holds
// (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4) of a, and (t, g), (t + 4, g) of b.
MOERUN_DEVICE void multiply_tiles_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                       const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

MOERUN_DEVICE unsigned thread_x() { return cuda_host::thread_index().x; }
MOERUN_DEVICE unsigned block_x() { return cuda_host::block_index().x; }
MOERUN_DEVICE unsigned block_y() { return cuda_host::block_index().y; }
MOERUN_DEVICE unsigned block_z() { return cuda_host::block_index().z; }
MOERUN_DEVICE unsigned num_threads() { return cuda_host::block_size().x; }
MOERUN_DEVICE unsigned num_blocks_x() { return cuda_host::grid_size().x; }

template <typename T>
MOERUN_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(cuda_host::shared_memory());
}

MOERUN_DEVICE void sync_block() { cuda_host::sync_block(); }
MOERUN_DEVICE void sync_warp() { cuda_host::exchange(cuda_host::WarpOperation::sync, nullptr, 0); }
template <typename T>
MOERUN_DEVICE T shuffle(T value, unsigned lane) {
  const std::byte* all =
      cuda_host::exchange(cuda_host::WarpOperation::shuffle, &value, sizeof(value));
  T result;
  std::memcpy(&result, all + lane % kWarpSize * cuda_host::kExchangeBytes, sizeof(result));
  return result;
}
template <typename T>
MOERUN_DEVICE T shuffle_xor(T value, unsigned mask) {
  return shuffle(value, (thread_x() ^ mask) % kWarpSize);
}
MOERUN_DEVICE unsigned ballot(bool vote) {
  const std::byte* all = cuda_host::exchange(cuda_host::WarpOperation::vote, &vote, sizeof(vote));
  unsigned result = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (all[lane * cuda_host::kExchangeBytes] != std::byte{0}) result |= 1u << lane;
  }
  return result;
}
MOERUN_DEVICE Pack16 load_once(const void* address) {
  Pack16 pack;
  std::memcpy(&pack, address, sizeof(pack));
  return pack;
}
MOERUN_DEVICE void copy_later(void* shared, const void* global) {
  cuda_host::copy_later(shared, global, 16);
}
MOERUN_DEVICE void commit_copies() { cuda_host::commit_copies(); }
template <unsigned kGroupsLeft>
MOERUN_DEVICE void wait_for_copies() {
  cuda_host::wait_for_copies(kGroupsLeft);
}
MOERUN_DEVICE float load_fresh(const float* address) { return *address; }
MOERUN_DEVICE void fence_for_device() {}
MOERUN_DEVICE void fence_for_host() {}
MOERUN_DEVICE void store_for_host(std::uint32_t* address, std::uint32_t value) { *address = value; }
// Threads are fibres of one thread.
MOERUN_DEVICE std::uint32_t add_atomically(std::uint32_t* address, std::uint32_t value) {
  const std::uint32_t before = *address;
  *address = before + value;
  return before;
}
MOERUN_DEVICE float to_float_f16(std::uint16_t bits) { return f16_to_float(bits); }
MOERUN_DEVICE float to_float_bf16(std::uint16_t bits) { return bf16_to_float(bits); }
MOERUN_DEVICE std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
MOERUN_DEVICE float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }
MOERUN_DEVICE float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
MOERUN_DEVICE std::uint32_t pack_bf16(float low, float high) {
  const auto round = [](float value) -> std::uint32_t {
    if (value != value) return 0x7fff;
    const std::uint32_t bits = bits_of(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return round(low) | round(high) << 16;
}
MOERUN_DEVICE std::uint32_t round_to_tf32(float value) {
  const std::uint32_t bits = bits_of(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000u : bits;
}
MOERUN_DEVICE void prefetch_l2(const void*) {}
MOERUN_DEVICE unsigned count_bits(std::uint32_t bits) {
  return static_cast<unsigned>(std::popcount(bits));
}

void multiply_tiles_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void multiply_tiles_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

#endif

MOERUN_DEVICE unsigned lane() { return thread_x() % kWarpSize; }
MOERUN_DEVICE unsigned warp() { return thread_x() / kWarpSize; }
MOERUN_DEVICE unsigned num_warps() { return num_threads() / kWarpSize; }

// A finite number bit by bit, anything else as NaN.
MOERUN_DEVICE float nan_unless_finite(float x) { return fused_multiply_add(x, 0.0f, x); }

// Every lane gets the sum, added in the same order on each.
MOERUN_DEVICE float sum_over_warp(float value) {
  for (unsigned mask = kWarpSize / 2; mask != 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
MOERUN_DEVICE float max_over_warp(float value) {
  for (unsigned mask = kWarpSize / 2; mask != 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
