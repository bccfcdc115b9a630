// What the expert cache counts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moerun {

// Of decoding; a prompt streams through the ring and does not count. "Whole": all records resident.
struct CacheCounters {
  std::uint64_t lookups = 0;
  std::uint64_t hits = 0;      // whole
  std::uint64_t top_hits = 0;  // the top segment only
  std::uint64_t misses = 0;
  std::uint64_t prefetch_issued = 0;
  std::uint64_t prefetch_useful = 0;  // used, and there in time
  std::uint64_t prefetch_late = 0;    // used, but still on its way
  std::uint64_t prefetch_wasted = 0;
  std::uint64_t demand_bytes = 0;    // read because an expert was needed at once
  std::uint64_t prefetch_bytes = 0;  // read ahead, used or not
  std::uint64_t wasted_bytes = 0;    // of these, for what was not used, as far as it had come
  double stalled_seconds = 0;        // computing waited for a segment

  CacheCounters& operator+=(const CacheCounters& other) {
    lookups += other.lookups;
    hits += other.hits;
    top_hits += other.top_hits;
    misses += other.misses;
    prefetch_issued += other.prefetch_issued;
    prefetch_useful += other.prefetch_useful;
    prefetch_late += other.prefetch_late;
    prefetch_wasted += other.prefetch_wasted;
    demand_bytes += other.demand_bytes;
    prefetch_bytes += other.prefetch_bytes;
    wasted_bytes += other.wasted_bytes;
    stalled_seconds += other.stalled_seconds;
    return *this;
  }
};

struct CacheStats {
  std::vector<CacheCounters> layers;  // as CacheLayout::layers
  std::uint64_t decode_tokens = 0;
  double decode_seconds = 0;       // of those tokens
  std::uint64_t warm_bytes = 0;    // read into slots before anything asked for it
  std::uint64_t reconfigured = 0;  // how often
  std::size_t arena_bytes = 0;     // slots and ring, and what a smaller layout leaves over
  std::uint64_t link_bytes = 0;    // read while decoding
  double link_busy_seconds = 0;    // with at least one read under way
  double best_link_rate = 0;       // bytes/s, of any stretch of decoding long enough to tell
  bool is_direct = false;          // reads bypass the page cache
  bool is_prefetching = false;
  bool is_caching = false;
  bool is_predicting = false;  // what stays is decided by when it will be used again
  std::string reason;          // why one of them is off, or on
};

}  // namespace moerun
