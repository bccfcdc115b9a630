// Sleeping in the kernel until another thread changes a number: std::atomic::wait() first yields,
// which on a busy machine costs a time slice, and cannot wake a given number of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace moerun {

// Returns when woken, by a signal, or at once if `word` is not `expected`.
void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) noexcept;
void futex_wake(std::atomic<std::uint32_t>& word, int most_threads) noexcept;

}  // namespace moerun
