// One quantum of an expert for a few tokens, by all threads of a block: the device code that the
// float32 kernels share.
//
// A record's dot product with x: lane l of a warp takes chunks l, l + 32, ... of 8 elements and
// adds by fused multiply-add; the lanes are added in the tree of sum_over_warp. No sum depends on
// how many tokens are computed together.
#pragma once

#include <cmath>

#include "device/op_params.h"
#include "kernels/intrinsics.h"
#include "kernels/vector.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

inline constexpr unsigned kChunk = 8;  // consecutive elements that a lane takes at once
inline constexpr unsigned kQuantum = kQuantumRecords;

// 8 weights as they come from memory.
template <DType kDType>
struct Chunk {
  Pack16 packs[kDType == DType::f32 ? 2 : 1];
};

template <DType kDType>
inline constexpr unsigned kChunkBytes = sizeof(Chunk<kDType>);

// Loads that a lane keeps under way: 8 of 16 bytes, which with 8 warps a block are 32 KiB of it.
template <DType kDType>
inline constexpr unsigned kChunksAhead = kDType == DType::f32 ? 4 : 8;

template <DType kDType>
MOERUN_DEVICE Chunk<kDType> load_chunk(const std::byte* source) {
  Chunk<kDType> chunk;
  MOERUN_UNROLL
  for (unsigned i = 0; i < kChunkBytes<kDType> / 16; ++i) {
    chunk.packs[i] = load_once(source + i * 16);
  }
  return chunk;
}

template <DType kDType>
MOERUN_DEVICE void widen(const Chunk<kDType>& chunk, float (&numbers)[kChunk]) {
  MOERUN_UNROLL
  for (unsigned i = 0; i < kChunk; ++i) {
    constexpr unsigned kPerPack = kPackWeights<kDType>;
    numbers[i] = weight_at<kDType>(chunk.packs[i / kPerPack], i % kPerPack);
  }
}

// The records of a quantum, and the tokens that want them.
struct Quantum {
  const std::byte* records;  // (num_records, 3, hidden)
  unsigned num_records;      // at most kQuantum
  unsigned hidden;           // padded: a multiple of 32

  MOERUN_DEVICE unsigned num_chunks() const { return hidden / kChunk; }
};

// Shared memory of a block for up to max_tokens tokens.
struct QuantumMemory {
  float* x;          // (max_tokens, 2, chunks, 4): halves of chunks apart, or banks would collide
  float* activated;  // (kQuantum, tokens)

  static constexpr std::size_t bytes(std::size_t hidden, std::size_t max_tokens) {
    return max_tokens * (hidden + kQuantumRecords) * sizeof(float);
  }
};

MOERUN_DEVICE QuantumMemory quantum_memory(unsigned hidden, unsigned max_tokens) {
  auto* x = shared_memory<float>();
  return {x, x + std::size_t{max_tokens} * hidden};
}

// Copies a token's row of `cols` numbers, its padding zero. Ends without a barrier.
MOERUN_DEVICE void copy_token(const float* row, unsigned cols, unsigned hidden, unsigned token,
                              const QuantumMemory& memory) {
  float* target = memory.x + std::size_t{token} * hidden;
  for (unsigned i = thread_x(); i < hidden; i += num_threads()) {
    const unsigned half = i % kChunk / 4;
    target[half * (hidden / 2) + i / kChunk * 4 + i % 4] = i < cols ? row[i] : 0.0f;
  }
}

// A chunk of x; `half_row` is how many floats its second half lies behind.
MOERUN_DEVICE void load_x(const float* x, unsigned half_row, float (&numbers)[kChunk]) {
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    const auto pack = *reinterpret_cast<const Pack16*>(x + half * half_row);
    MOERUN_UNROLL
    for (unsigned i = 0; i < 4; ++i) numbers[half * 4 + i] = float_of(pack.words[i]);
  }
}

// Asks for a row of weights, with a warp; rows start on 64-byte borders.
template <DType kDType>
MOERUN_DEVICE void prefetch_row(const std::byte* row, unsigned hidden) {
  const unsigned bytes = hidden / kChunk * kChunkBytes<kDType>;
  for (unsigned i = lane() * 64; i < bytes; i += kWarpSize * 64) prefetch_l2(row + i);
}

template <DType kDType>
MOERUN_DEVICE const std::byte* row_of(const Quantum& quantum, unsigned record, unsigned row) {
  return quantum.records +
         (std::size_t{record} * 3 + row) * quantum.num_chunks() * kChunkBytes<kDType>;
}

// What a warp will read first, before it is known for whom.
template <DType kDType>
MOERUN_DEVICE void prefetch_first_rows(const Quantum& quantum) {
  if (warp() >= quantum.num_records) return;
  prefetch_row<kDType>(row_of<kDType>(quantum, warp(), 0), quantum.hidden);
  prefetch_row<kDType>(row_of<kDType>(quantum, warp(), 1), quantum.hidden);
}

// Sums over a warp, each as sum_over_warp would give it: of kCount values (a power of 2, at most
// 32) lane l gets that of value l / (32 / kCount).
template <unsigned kCount>
MOERUN_DEVICE float spread_sums(const float (&values)[kCount], unsigned mask = kWarpSize / 2) {
  if constexpr (kCount == 1) {
    float sum = values[0];
    for (; mask != 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  } else {
    float sums[kCount / 2];
    const bool is_upper = (lane() & mask) != 0;
    MOERUN_UNROLL
    for (unsigned i = 0; i < kCount / 2; ++i) {
      const float low = values[i];
      const float high = values[i + kCount / 2];
      sums[i] = (is_upper ? high : low) + shuffle_xor(is_upper ? low : high, mask);
    }
    return spread_sums(sums, mask / 2);
  }
}

MOERUN_DEVICE float silu(float value) { return value / (1.0f + std::exp(-value)); }

// Phase 1, a warp a record: activated = silu(gate . x) * (up . x). Down rows are asked for
// meanwhile, so that phase 2 does not begin by waiting for memory.
template <DType kDType, unsigned kTokens>
MOERUN_DEVICE void activate_records(const Quantum& quantum, const QuantumMemory& memory) {
  constexpr unsigned kAhead =
      kChunksAhead<kDType> / (kTokens == 8 ? 4 : 2);  // of each of the two rows
  const unsigned num_chunks = quantum.num_chunks();
  const std::size_t row_bytes = std::size_t{num_chunks} * kChunkBytes<kDType>;
  for (unsigned record = warp(); record < quantum.num_records; record += num_warps()) {
    prefetch_row<kDType>(row_of<kDType>(quantum, record, 2), quantum.hidden);
    const std::byte* row =
        row_of<kDType>(quantum, record, 0) + std::size_t{lane()} * kChunkBytes<kDType>;
    const float* x = memory.x + lane() * 4;
    float sums[2 * kTokens] = {};  // (gate and up, tokens)
    for (unsigned first = lane(); first < num_chunks; first += kAhead * kWarpSize) {
      Chunk<kDType> chunks[kAhead][2];
      MOERUN_UNROLL
      for (unsigned i = 0; i < kAhead; ++i) {
        chunks[i][0] = chunks[i][1] = {};
        if (first + i * kWarpSize < num_chunks) {
          const std::byte* source = row + i * kWarpSize * kChunkBytes<kDType>;
          chunks[i][0] = load_chunk<kDType>(source);
          chunks[i][1] = load_chunk<kDType>(source + row_bytes);
        }
      }
      MOERUN_UNROLL
      for (unsigned i = 0; i < kAhead; ++i) {
        if (first + i * kWarpSize >= num_chunks) break;
        float gate[kChunk];
        float up[kChunk];
        widen<kDType>(chunks[i][0], gate);
        widen<kDType>(chunks[i][1], up);
        MOERUN_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) {
          float numbers[kChunk];
          load_x(x + t * quantum.hidden + i * kWarpSize * 4, quantum.hidden / 2, numbers);
          MOERUN_UNROLL
          for (unsigned k = 0; k < kChunk; ++k) {
            sums[t] = fused_multiply_add(gate[k], numbers[k], sums[t]);
            sums[kTokens + t] = fused_multiply_add(up[k], numbers[k], sums[kTokens + t]);
          }
        }
      }
      row += kAhead * kWarpSize * kChunkBytes<kDType>;
      x += kAhead * kWarpSize * 4;
    }
    // The lower half of the warp gets gates, the upper ups.
    constexpr unsigned kLanes = kWarpSize / 2 / kTokens;
    const float own = spread_sums(sums);
    const float other = shuffle_xor(own, kWarpSize / 2);
    if (lane() < kWarpSize / 2 && lane() % kLanes == 0) {
      memory.activated[record * kTokens + lane() / kLanes] = silu(own) * other;
    }
  }
}

// Stores a thread's 8 columns, or adds them to what is there.
MOERUN_DEVICE void put_columns(float* target, const float (&sums)[kChunk], bool accumulate) {
  MOERUN_UNROLL
  for (unsigned half = 0; half < 2; ++half) {
    Float4 value;
    MOERUN_UNROLL
    for (unsigned i = 0; i < 4; ++i) value.at[i] = sums[half * 4 + i];
    if (accumulate) {
      const Float4 before = load4(target + half * 4);
      MOERUN_UNROLL
      for (unsigned i = 0; i < 4; ++i) value.at[i] = before.at[i] + value.at[i];
    }
    store4(target + half * 4, value);
  }
}

// Phase 2, a thread 8 columns: P[h] = sum of activated * down over the records in index order;
// stored at sum_of(token), or added to what is there.
template <DType kDType, unsigned kTokens, typename SumOf>
MOERUN_DEVICE void sum_records(const Quantum& quantum, const QuantumMemory& memory,
                               const SumOf& sum_of, unsigned num_tokens, bool accumulate) {
  constexpr unsigned kAhead = kChunksAhead<kDType> / (kTokens <= 2 ? 1 : 2);
  const std::size_t record_bytes = std::size_t{quantum.num_chunks()} * 3 * kChunkBytes<kDType>;
  for (unsigned index = thread_x(); index < quantum.num_chunks(); index += num_threads()) {
    const std::byte* down =
        row_of<kDType>(quantum, 0, 2) + std::size_t{index} * kChunkBytes<kDType>;
    float sums[kTokens][kChunk] = {};
    for (unsigned first = 0; first < quantum.num_records; first += kAhead) {
      Chunk<kDType> chunks[kAhead];
      MOERUN_UNROLL
      for (unsigned i = 0; i < kAhead; ++i) {
        chunks[i] = {};
        if (first + i < quantum.num_records) chunks[i] = load_chunk<kDType>(down);
        down += record_bytes;
      }
      MOERUN_UNROLL
      for (unsigned i = 0; i < kAhead; ++i) {
        if (first + i >= quantum.num_records) break;
        float numbers[kChunk];
        widen<kDType>(chunks[i], numbers);
        MOERUN_UNROLL
        for (unsigned t = 0; t < kTokens; ++t) {
          const float weight = memory.activated[(first + i) * kTokens + t];
          MOERUN_UNROLL
          for (unsigned k = 0; k < kChunk; ++k) {
            sums[t][k] = fused_multiply_add(weight, numbers[k], sums[t][k]);
          }
        }
      }
    }
    MOERUN_UNROLL
    for (unsigned t = 0; t < kTokens; ++t) {
      if (t < num_tokens) put_columns(sum_of(t) + index * kChunk, sums[t], accumulate);
    }
  }
}

template <DType kDType, unsigned kTokens, typename SumOf>
MOERUN_DEVICE void run_phases(const Quantum& quantum, const QuantumMemory& memory,
                              const SumOf& sum_of, unsigned num_tokens, bool accumulate) {
  sync_block();
  activate_records<kDType, kTokens>(quantum, memory);
  sync_block();
  sum_records<kDType, kTokens>(quantum, memory, sum_of, num_tokens, accumulate);
  sync_block();
}

// Both phases for num_tokens <= kMaxTokens tokens, whose rows all threads have copied;
// sum_of(token) is where P goes. Begins and ends with a barrier. Reads as many rows of x as the
// next power of 2 says.
template <DType kDType, unsigned kMaxTokens, typename SumOf>
MOERUN_DEVICE void compute_quantum(const Quantum& quantum, const QuantumMemory& memory,
                                   const SumOf& sum_of, unsigned num_tokens, bool accumulate) {
  if constexpr (kMaxTokens == 1) {
    run_phases<kDType, 1>(quantum, memory, sum_of, num_tokens, accumulate);
  } else if (num_tokens <= kMaxTokens / 2) {
    compute_quantum<kDType, kMaxTokens / 2>(quantum, memory, sum_of, num_tokens, accumulate);
  } else {
    run_phases<kDType, kMaxTokens>(quantum, memory, sum_of, num_tokens, accumulate);
  }
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
