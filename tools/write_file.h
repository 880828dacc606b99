// Write file: a text to a file, as a whole or not at all.
#pragma once

#include <string>

namespace fourmoe::tools {

// To a temporary name beside `path`, then renamed. Throws Error: write_failed.
void write_file(const std::string& path, const std::string& text);

}  // namespace fourmoe::tools
