// Write file: where an output may go, and a text to a file, as a whole or not at all.
#pragma once

#include <filesystem>
#include <string>

namespace fourmoe::tools {

bool same_file(const std::filesystem::path& a, const std::filesystem::path& b);

// Refuses an output without a folder that can be written, one that is there and no regular file, a link, and one that
// is a file of `checkpoint` (may be empty) or would be taken for one: a rename would put a file in its place. Throws
// Error: write_failed, file_exists.
void check_output(const std::string& output, const std::string& checkpoint);

// To a temporary name beside `path`, then renamed. Throws Error: write_failed.
void write_file(const std::string& path, const std::string& text);

}  // namespace fourmoe::tools
