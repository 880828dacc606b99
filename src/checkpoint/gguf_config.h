// gguf_config: a GGUF file's metadata as the same Config that config.json gives.
#pragma once

#include <string_view>

#include "checkpoint/config.h"
#include "checkpoint/gguf.h"

namespace fourmoe::checkpoint {

// Throws family_unknown with the known architectures, file_malformed with file and key, routing_unsupported.
Config read_gguf_config(const Gguf& gguf, std::string_view file);

}  // namespace fourmoe::checkpoint
