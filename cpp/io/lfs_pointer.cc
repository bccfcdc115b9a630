#include "io/lfs_pointer.h"

#include <charconv>
#include <cstdint>

#include "base/bytes_text.h"
#include "base/error.h"

namespace moerun {

void check_not_lfs_pointer(std::string_view text, const std::string& where) {
  if (!text.starts_with("version https://git-lfs.github.com/spec/")) return;
  constexpr std::string_view kSize = "\nsize ";
  std::string size;
  if (const auto found = text.find(kSize); found != std::string_view::npos) {
    std::uint64_t bytes = 0;
    const char* begin = text.data() + found + kSize.size();
    const auto [end, error] = std::from_chars(begin, text.data() + text.size(), bytes);
    if (error == std::errc{} && end != begin) size = " (" + bytes_text(bytes) + ")";
  }
  throw FormatError(message(where, ": is a git-lfs pointer; the file itself", size,
                            " was not downloaded: run `git lfs pull` in its folder, or download "
                            "the model again"));
}

}  // namespace moerun
