// How many threads computed.
#pragma once

namespace moerun {

// In loops that are large enough for several threads, since the beginning.
struct ThreadUse {
  double seconds = 0;         // in such loops
  double thread_seconds = 0;  // of all threads that the loops were given
  double wanted_seconds = 0;  // of all that they would have on an idle machine

  double mean_threads() const { return seconds > 0 ? thread_seconds / seconds : 0; }
  // Threads that loops went without because other programs use the cores.
  double mean_withheld() const {
    return seconds > 0 ? (wanted_seconds - thread_seconds) / seconds : 0;
  }
};

}  // namespace moerun
