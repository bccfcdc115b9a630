#include "io/quote.h"

namespace moerun {

std::string quote(std::string_view text, std::size_t max_bytes) {
  constexpr char kHex[] = "0123456789abcdef";
  const bool is_cut = text.size() > max_bytes;
  if (is_cut) {
    std::size_t end = max_bytes;
    // Back to the start of a UTF-8 character, or the message itself would not be text.
    while (end + 4 > max_bytes && end > 0 &&
           (static_cast<unsigned char>(text[end]) & 0xc0u) == 0x80u)
      --end;
    text = text.substr(0, end);
  }
  std::string out = "'";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      out += "\\x";
      out += kHex[byte >> 4];
      out += kHex[byte & 0xfu];
    } else {
      out += c;
    }
  }
  out += is_cut ? "...'" : "'";
  return out;
}

std::string shape_text(std::span<const std::uint64_t> shape) {
  std::string out = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i != 0) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + "]";
}

}  // namespace moerun
