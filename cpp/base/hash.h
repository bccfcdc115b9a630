// FNV-1a with 64 bits: tells contents apart, proves nothing against someone who wants two alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/view.h"

namespace moerun {

class Fnv1a {
 public:
  void add(ConstBytes bytes) {
    for (const std::byte byte : bytes) {
      value_ = (value_ ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3ull;
    }
  }
  // The text and its length, so that two texts in a row differ from the same letters cut elsewhere.
  void add(std::string_view text) {
    add(text.size());
    add(std::as_bytes(std::span(text)));
  }
  void add(std::uint64_t number) {
    for (int shift = 0; shift < 64; shift += 8) {
      value_ = (value_ ^ (number >> shift & 0xffu)) * 0x100000001b3ull;
    }
  }

  std::uint64_t value() const { return value_; }
  // 16 hexadecimal digits.
  std::string text() const {
    std::string digits(16, '0');
    for (std::size_t i = 0; i < 16; ++i) {
      digits[15 - i] = "0123456789abcdef"[value_ >> (4 * i) & 15];
    }
    return digits;
  }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325ull;
};

}  // namespace moerun
