// What happened to the expert cache, one plain record at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace moerun {

enum class CacheEventKind : std::uint8_t {
  hit,              // looked up; all of it was resident
  top_hit,          // looked up; its top segment was resident, the bottom one had to come
  miss,             // looked up; nothing of it was resident
  insert,           // got a slot
  evict,            // lost its slot
  prefetch,         // asked for ahead of its use
  prefetch_useful,  // used, and there in time
  prefetch_late,    // used, but still on its way
  prefetch_wasted,  // not used
};

constexpr std::string_view name_of(CacheEventKind kind) {
  constexpr std::string_view kNames[] = {
      "hit",      "top_hit",         "miss",          "insert",         "evict",
      "prefetch", "prefetch_useful", "prefetch_late", "prefetch_wasted"};
  return kNames[static_cast<std::size_t>(kind)];
}

// `token`: how many decoded tokens the cache had served before.
struct CacheEvent {
  std::uint64_t token = 0;
  std::size_t layer = 0;
  std::size_t expert = 0;
  CacheEventKind kind = CacheEventKind::hit;

  bool operator==(const CacheEvent&) const = default;
};

// Told of every event, in order, on the thread that computes.
class TraceSink {
 public:
  virtual ~TraceSink() = default;
  virtual void record(const CacheEvent& event) = 0;
};

}  // namespace moerun
