// gguf: metadata and tensor table of a GGUF file, validated; and its 4-bit blocks in this project's order.
//
// Format: magic, version, counts, key-value pairs, tensor infos, padding, data. Source: ggml docs/gguf.md,
// ggml-common.h (blocks), ggml-impl.h (UE4M3).
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "checkpoint/mapped_file.h"
#include "format/number.h"

namespace fourmoe::checkpoint {

// Types of ggml that can become a matrix here; all others are known by size alone.
enum GgmlType : u32 { kGgmlF32 = 0, kGgmlF16 = 1, kGgmlBf16 = 30, kGgmlMxfp4 = 39, kGgmlNvfp4 = 40 };

struct GgufTensor {
  u32 type = 0;            // of ggml
  std::vector<i64> shape;  // outermost first: the reverse of the file's order
  i64 offset = 0;          // of its first byte in the file
  i64 bytes = 0;           // inside the file

  bool present() const { return !shape.empty(); }
};

using GgufValue = std::variant<i64, f64, bool, std::string>;  // arrays are validated and left out

struct Gguf {
  std::map<std::string, GgufValue, std::less<>> metadata;
  std::map<std::string, GgufTensor, std::less<>> tensors;
};

// `bytes` is the whole file, called `name` in messages; only its head is touched. Throws file_malformed with name, key
// or tensor, and offset.
Gguf parse_gguf(std::span<const u8> bytes, std::string_view name);

// "Q4_K", or "type 77".
std::string ggml_type_name(u32 type);

// One row of `cols` values (a multiple of 64) from blocks of 64: 4 UE4M3 scales, 32 bytes in which byte j of each 8
// holds values j and j + 8. codes [cols/2] u8 in even/odd pairs, scales [cols/16] E4M3; UE4M3 0x7f decodes to 0 in
// ggml. Returns the index of the first scale with bit 7 set, which UE4M3 has no meaning for; -1 for none.
i64 unpack_nvfp4_row(const u8* row, i64 cols, u8* codes, u8* scales);

// One row of `cols` values (a multiple of 32) from blocks of 32: an E8M0 scale, 16 bytes in which byte j holds values j
// and j + 16. codes [cols/2], scales [cols/32]. Returns the index of the first NaN scale (255); -1 for none.
i64 unpack_mxfp4_row(const u8* row, i64 cols, u8* codes, u8* scales);

}  // namespace fourmoe::checkpoint
