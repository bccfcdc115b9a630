// Budgets as users write them.
#pragma once

#include <cstddef>
#include <string_view>

namespace moerun {

// Bytes that a text stands for: a share of `total_bytes` ("25%"), a size ("6GiB", "500MB"), or a
// number of bytes. InvalidArgument for anything else, and for nothing.
std::size_t parse_budget(std::string_view text, std::size_t total_bytes);
// The same for the most memory that may be page-locked, of which there may be none.
std::size_t parse_pin_limit(std::string_view text, std::size_t total_bytes);
// The same for the KV caches of a batch.
std::size_t parse_kv_budget(std::string_view text, std::size_t total_bytes);

}  // namespace moerun
