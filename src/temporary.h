// temporary: names for what is written beside its place and renamed when it is whole.
#pragma once

#include <filesystem>
#include <string_view>

namespace fourmoe {

// A hidden name in the folder of `path` that nobody has: .NAME.RANDOM.ENDING. Process numbers repeat (each container
// begins at 1), and what a killed process left would be in the way of all that follow.
std::filesystem::path temporary_beside(const std::filesystem::path& path, std::string_view ending);

}  // namespace fourmoe
