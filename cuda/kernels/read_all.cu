#include "kernels/read_all.h"

#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kAhead = 8;  // loads of a thread that are under way at once
constexpr unsigned kPacksPerBlock = static_cast<unsigned>(kReadBlockBytes / sizeof(Pack16));
static_assert(kPacksPerBlock % (kThreads * kAhead) == 0);

struct ReadArguments {
  const Pack16* data;
  std::uint32_t* sink;
  unsigned packs_per_block;  // a constant would be unrolled until registers spill
};

MOERUN_KERNEL MOERUN_BOUNDS(kThreads, 4) read_all_kernel(ReadArguments a) {
  const Pack16* packs = a.data + std::size_t{block_x()} * a.packs_per_block + thread_x();
  std::uint32_t bits = 0;
  for (unsigned first = 0; first < a.packs_per_block; first += kThreads * kAhead) {
    Pack16 ahead[kAhead];
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) ahead[i] = load_once(packs + first + i * kThreads);
    MOERUN_UNROLL
    for (unsigned i = 0; i < kAhead; ++i) {
      bits ^= ahead[i].words[0] ^ ahead[i].words[1] ^ ahead[i].words[2] ^ ahead[i].words[3];
    }
  }
  // The compiler may not drop what could be written.
  if (bits == 0x9e3779b9u) *a.sink = bits;
}

}  // namespace

void read_all(StreamHandle stream, const std::byte* data, std::size_t bytes, std::uint32_t* sink) {
  const auto blocks = static_cast<unsigned>(bytes / kReadBlockBytes);
  if (blocks == 0) return;
  const ReadArguments arguments{reinterpret_cast<const Pack16*>(data), sink, kPacksPerBlock};
  launch<read_all_kernel>(stream, {blocks, 1, 1, kThreads, 0}, arguments, "read_all");
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
