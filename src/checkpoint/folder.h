// folder: which files make up a safetensors checkpoint, and their tensors.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/config.h"
#include "checkpoint/safetensors.h"

namespace fourmoe::checkpoint {

struct Folder {
  std::filesystem::path path;  // as the user gave it
  Config config;
  TensorMap tensors;
  i64 files = 0;
};

// Throws file_unreadable (names the missing shard or config.json), file_malformed, tensor_missing (a tensor that the
// index promises and the shard lacks).
Folder open_folder(const std::filesystem::path& path);

// Shards that an index names, without repetition, in order of first mention. A name that is not a plain file name of
// the same folder is refused. `file` is for messages.
std::vector<std::string> list_shards(std::string_view index, std::string_view file);

// Files that make up the checkpoint of a folder: shards of its one index, model.safetensors, or its only *.safetensors.
struct FolderFiles {
  std::filesystem::path index;                // empty: there is none
  std::vector<std::filesystem::path> shards;  // in order of first mention
};

// Throws file_unreadable: no such files, more than one index, or a missing shard.
FolderFiles find_files(const std::filesystem::path& folder);

// Throws tensor_missing for the first tensor that the index promises and the shard lacks.
void check_promises(const std::filesystem::path& index, const TensorMap& tensors);

}  // namespace fourmoe::checkpoint
