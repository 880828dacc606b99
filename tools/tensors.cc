#include "tensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "status.h"

namespace fourmoe::tools {
namespace {

using format::Dtype;

constexpr std::pair<std::string_view, Dtype> kDtypes[] = {{"F32", Dtype::f32},   {"F16", Dtype::f16},
                                                          {"BF16", Dtype::bf16}, {"I32", Dtype::i32},
                                                          {"I64", Dtype::i64},   {"U8", Dtype::u8}};

std::string list_names(const checkpoint::TensorMap& tensors) {
  std::string names;
  constexpr std::size_t kMost = 8;
  std::size_t count = 0;
  for (const auto& [name, tensor] : tensors) {
    if (count++ == kMost) return names + ", ...";
    names += (names.empty() ? "" : ", ") + name;
  }
  return names.empty() ? "none" : names;
}

}  // namespace

TensorFile::TensorFile(const std::string& path) : path_(path) {
  checkpoint::parse_safetensors(checkpoint::MappedFile::open(path), &tensors_, nullptr);
}

format::Tensor TensorFile::matrix(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    throw Error(Reason::tensor_missing,
                fmt::format("{} has no tensor {}; it has {}", path_, name, list_names(tensors_)));
  }
  const checkpoint::StoredTensor& stored = found->second;
  if (stored.shape.size() != 2) {
    throw Error(Reason::tensor_mismatch, fmt::format("{}: {} is {}, expected a matrix of tokens", path_, name,
                                                     checkpoint::shape_text(stored.shape)));
  }
  for (const auto& [word, dtype] : kDtypes) {
    if (stored.dtype != word) continue;
    static u8 nothing[1];  // a view without rows is a view, not an absent tensor
    u8* data = stored.bytes == 0 ? nothing : const_cast<u8*>(stored.data());
    return {data, dtype, stored.shape[0], stored.shape[1], stored.shape[1]};
  }
  throw Error(Reason::dtype_unsupported, fmt::format("{}: {} is {}", path_, name, stored.dtype));
}

std::string stored_dtype(Dtype dtype) {
  for (const auto& [word, value] : kDtypes) {
    if (value == dtype) return std::string(word);
  }
  return "";
}

Rows take_rows(const format::Tensor& tensor, const std::vector<i64>& rows) {
  Rows taken;
  if (tensor.empty()) return taken;
  const i64 bytes = tensor.cols * format::dtype_bytes(tensor.dtype);
  taken.memory.resize(std::max<i64>(1, bytes * static_cast<i64>(rows.size())));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(taken.memory.data() + static_cast<i64>(i) * bytes, tensor.row(rows[i]),
                static_cast<std::size_t>(bytes));
  }
  taken.view = {taken.memory.data(), tensor.dtype, static_cast<i64>(rows.size()), tensor.cols, tensor.cols};
  return taken;
}

}  // namespace fourmoe::tools
