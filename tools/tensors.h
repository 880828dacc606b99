// Tensors of a safetensors file as the arguments of a layer.
#pragma once

#include <optional>
#include <string>

#include "checkpoint/safetensors.h"
#include "format/tensor.h"

namespace fourmoe::tools {

class TensorFile {
 public:
  explicit TensorFile(const std::string& path);

  bool has(std::string_view name) const { return tensors_.contains(name); }
  // A matrix of floats or integers, [rows, cols]; the file keeps its memory. Throws tensor_missing, tensor_mismatch,
  // dtype_unsupported.
  format::Tensor matrix(const std::string& name) const;

 private:
  std::string path_;
  checkpoint::TensorMap tensors_;
};

// Name of a dtype in safetensors files.
std::string stored_dtype(format::Dtype dtype);

// Rows at..., evenly spaced, `count` of them, copied: what a check of a few tokens reads.
struct Rows {
  format::Tensor view;
  std::vector<u8> memory;
};
Rows take_rows(const format::Tensor& tensor, const std::vector<i64>& rows);

}  // namespace fourmoe::tools
