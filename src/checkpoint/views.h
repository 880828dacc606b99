// views: from the tensors of a projection to matrices; copies only where the file holds them transposed.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checkpoint/names.h"
#include "checkpoint/scales.h"
#include "format/tensor.h"

namespace fourmoe::checkpoint {

// What a loaded layer keeps alive: mapped files, and memory for what had to be rearranged. Thread-safe.
class Owned {
 public:
  void keep(const std::shared_ptr<const MappedFile>& file);
  u8* take_bytes(i64 count);    // [count] u8, uninitialised; owned by this object
  f32* take_floats(i64 count);  // [count] f32, uninitialised; owned by this object

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::vector<std::unique_ptr<u8[]>> bytes_;
  std::vector<std::unique_ptr<f32[]>> floats_;
};

// Which rows of a projection's tensors are meant: those of one expert, and of gate or up where the two are fused.
struct Source {
  const Parts* parts = nullptr;
  i64 experts = 0;  // of the stack; 0: the tensors are of one expert
  i64 expert = 0;
  i64 halves = 1;            // 2: gate and up share the tensors
  i64 half = 0;              // 0 gate, 1 up
  bool interleaved = false;  // halves alternate row by row; else they follow each other
  i32 rows = 0;              // of one half
  i32 cols = 0;

  i64 all_rows() const { return halves * rows; }
  i64 first_row() const { return interleaved ? half : half * rows; }
  i64 row_step() const { return interleaved ? halves : 1; }
};

// How the tensors store a projection.
struct Form {
  format::Encoding encoding = format::Encoding::bf16;
  bool transposed = false;  // [in, out]
};

// Finds the form by dtypes and shapes; `prefer_transposed` decides where both orientations fit. Throws tensor_missing,
// tensor_mismatch (names the tensor, expected and found), encoding_unsupported.
Form examine(const Source& source, bool prefer_transposed);

// The matrix, with global 1. In transposed forms a copy in *owned.
format::Matrix view(const Source& source, const Form& form, Owned* owned);

// Position of a block scale in the file of the source's scale tensor.
i64 scale_offset(const Source& source, const Form& form, i64 row, i64 block);

// Global (of FP8: its one scale) and input scale as multipliers.
ProjectionScales read_scales(const Source& source);

// [rows] f32 in *owned; null without a bias.
const f32* read_bias(const Source& source, Owned* owned);

// A dense matrix [rows, cols] of bf16, f16 or f32, and a copy of such a one in *owned: calls read it long after layers
// are made, when the file may have changed. Throws value_not_finite.
format::Matrix read_dense(Named named, i64 rows, i64 cols, Owned* owned);
format::Matrix copy_dense(const format::Matrix& dense, const std::string& name, Owned* owned);

// A vector [count] or row [1, count] of f32, bf16 or f16, widened.
std::vector<f32> read_vector(Named named, i64 count);

// Throws value_not_finite for the first value that is not finite. `name` says where they are from.
void check_finite(const std::vector<f32>& values, const std::string& name);
void check_finite(const format::Matrix& dense, const std::string& name);

// `file: tensor "name"`, for messages.
std::string where(Named named);

}  // namespace fourmoe::checkpoint
