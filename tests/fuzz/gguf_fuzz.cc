// Fuzz target: the head of a GGUF file and its meaning as a config.
#include <cstddef>
#include <cstdlib>
#include <span>

#include "checkpoint/gguf.h"
#include "checkpoint/gguf_config.h"
#include "status.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace fourmoe;
  try {
    const checkpoint::Gguf gguf = checkpoint::parse_gguf(std::span<const u8>(data, size), "fuzz");
    for (const auto& [name, tensor] : gguf.tensors) {
      if (tensor.offset < 24 || tensor.bytes <= 0 || tensor.offset + tensor.bytes > static_cast<i64>(size))
        std::abort();
    }
    checkpoint::read_gguf_config(gguf, "fuzz");
  } catch (const Error&) {
  }
  return 0;
}
