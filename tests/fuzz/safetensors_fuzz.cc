// Fuzz target: the header of a safetensors file, and the names in it. Whatever is accepted must keep its promises.
#include <cstddef>
#include <cstdlib>
#include <span>

#include "checkpoint/names.h"
#include "checkpoint/safetensors.h"
#include "status.h"

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, std::size_t size) {
  using namespace fourmoe;
  checkpoint::TensorMap tensors;
  checkpoint::Metadata metadata;
  try {
    checkpoint::parse_safetensors(std::span<const u8>(data, size), "fuzz", &tensors, &metadata);
    for (const auto& [name, tensor] : tensors) {
      const bool inside =
          tensor.offset >= 8 && tensor.bytes >= 0 && tensor.offset + tensor.bytes <= static_cast<i64>(size);
      if (!inside || tensor.bytes != checkpoint::tensor_bytes(tensor.dtype, tensor.shape)) std::abort();
    }
    checkpoint::find_layers(tensors, true, 4);
  } catch (const Error&) {
  }
  return 0;
}
