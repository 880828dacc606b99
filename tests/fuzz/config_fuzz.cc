// Fuzz target: config.json with hf_quant_config.json after a 0 byte, and the same bytes as an index.
#include <cstddef>
#include <cstdlib>
#include <string_view>

#include "checkpoint/config.h"
#include "checkpoint/folder.h"
#include "status.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace fourmoe;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t split = text.find('\0');
  const std::string_view quant = split == std::string_view::npos ? std::string_view() : text.substr(split + 1);
  try {
    const checkpoint::Config config = checkpoint::parse_config(text.substr(0, split), "fuzz", quant, "fuzz quant");
    const bool sane = config.hidden > 0 && config.inter > 0 && config.experts > 0 && config.top_k > 0 &&
                      config.routing.groups > 0 && config.experts % config.routing.groups == 0;
    if (!sane) std::abort();
  } catch (const Error&) {
  }
  try {
    for (const std::string& shard : checkpoint::list_shards(text, "fuzz")) {
      if (shard.find('/') != std::string::npos || shard == "..") std::abort();
    }
  } catch (const Error&) {
  }
  return 0;
}
