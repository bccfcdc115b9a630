// Pointers that git-lfs leaves where a file was not downloaded.
#pragma once

#include <string>
#include <string_view>

namespace moerun {

// `text` is the file, or its beginning. Throws FormatError naming `where` if it is a pointer.
void check_not_lfs_pointer(std::string_view text, const std::string& where);

}  // namespace moerun
