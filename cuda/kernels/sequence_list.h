// Several sequences with one new token each, as a kernel is given them: by value, so that nothing
// has to be copied to the device before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/error.h"
#include "device/op_params.h"
#include "kernels/intrinsics.h"

namespace moerun::cuda::inline MOERUN_CUDA_SIDE {

// Of one launch: 1.5 KiB of the 4 KiB that a kernel's arguments may take on every device.
inline constexpr std::size_t kMaxSequences = 64;

struct SequenceEntry {
  float* keys;  // (num_kv_heads, capacity, kv_pitch)
  float* values;
  std::uint32_t capacity;
  std::uint32_t position;  // of the new token
};

struct SequenceList {
  SequenceEntry entries[kMaxSequences];
};

// Throws InvalidArgument unless the list fits a launch and every sequence has one row of `rows`,
// and a KV cache of the same pitch as the others.
inline void check_list(std::span<const SequenceRows> sequences, const Activations& rows,
                       const char* name) {
  if (sequences.size() > kMaxSequences || sequences.size() != rows.rows) {
    throw InvalidArgument(message(name, ": ", sequences.size(), " sequences in ", rows.rows,
                                  " rows; expected one row each, and at most ", kMaxSequences));
  }
  for (const SequenceRows& each : sequences) {
    if (each.num_rows == 1 && each.kv.pitch == sequences.front().kv.pitch) continue;
    throw InvalidArgument(message(name, ": a sequence of ", each.num_rows,
                                  " rows and a KV cache with a pitch of ", each.kv.pitch,
                                  "; expected 1 and ", sequences.front().kv.pitch));
  }
}

// Of sequences that have been checked.
inline SequenceList list_of(std::span<const SequenceRows> sequences) {
  SequenceList list{};
  std::size_t i = 0;
  for (const SequenceRows& each : sequences) {
    list.entries[i++] = {each.kv.keys, each.kv.values, static_cast<std::uint32_t>(each.kv.capacity),
                         static_cast<std::uint32_t>(each.first_position)};
  }
  return list;
}

}  // namespace moerun::cuda::inline MOERUN_CUDA_SIDE
