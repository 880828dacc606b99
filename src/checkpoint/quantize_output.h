// quantize_output: where quantize writes, so that nothing of the user's is lost: what may be replaced, what goes along
// beside the weights, and a folder that appears only when it is whole.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace fourmoe::checkpoint {

// Whole files of text. Throw Error(file_unreadable) or Error(write_failed).
std::string read_text(const std::filesystem::path& path);
void write_text(const std::filesystem::path& path, const std::string& text);

// Absolute, with the links of its folder resolved, and without a trailing slash. Throws Error(argument_invalid) for "".
std::filesystem::path settle(const std::filesystem::path& path);

// Refuses an output that is the input's folder, in it or around it, whose parent is missing, or that exists: without
// `force` any, with it what holds a file that is no part of an earlier output. Both paths settled. Throws Error.
void check_output(const std::filesystem::path& in, const std::filesystem::path& out, bool force);

// Files beside the weights that go along, relative to the folder, sorted; notes say which do not.
std::vector<std::filesystem::path> list_side_files(const std::filesystem::path& folder,
                                                   std::vector<std::string>* notes);

// The output, hidden until it is whole: a folder beside `out`, removed unless it is published. Throws Error.
class Publication {
 public:
  explicit Publication(const std::filesystem::path& out);
  ~Publication();
  Publication(const Publication&) = delete;
  Publication& operator=(const Publication&) = delete;

  const std::filesystem::path& folder() const { return folder_; }

  // Renames it to `out`. An old output steps aside first (refused without `force`) and comes back when the new one
  // cannot take its place.
  void publish(bool force);

 private:
  std::filesystem::path out_;
  std::filesystem::path folder_;
  std::filesystem::path replaced_;
  bool published_ = false;
};

}  // namespace fourmoe::checkpoint
