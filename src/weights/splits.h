// Splits: a tensor of weights given as a list of tensors along the expert dimension.
//
// A layer's experts may lie in any number of tensors of any sizes: one stack, one a rank, one an expert. Nothing is
// copied: split i holds experts [begin_i, begin_i + shape[0]). A list is checked as a whole before anything reads it.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "format/tensor.h"

namespace fourmoe::weights {

// Element types of tensors that hold weights, scales, globals or biases.
enum class Element : u8 { f32, f16, bf16, i32, i64, u8, e4m3, e8m0, other };

std::string_view element_name(Element element);
i64 element_bytes(Element element);

// One tensor of a list.
struct Split {
  const fourmoe::u8* data = nullptr;  // [shape] element, `strides` apart; may be null only when empty; caller's
  Element element = Element::u8;
  std::vector<i64> shape;    // [experts, ...]
  std::vector<i64> strides;  // elements between neighbours of each dimension
  i32 device = -1;           // -1: host memory, else index of a CUDA device
};

class Splits {
 public:
  // Not given.
  Splits() = default;

  // Throws Error(argument_invalid, dtype_unsupported or stride_unsupported) naming the split ("gate[2]", or "gate" for
  // a single tensor), what was expected and what was found: a list has at least one split, each holds at least one
  // expert, all agree in element type, device and every dimension but the first, and innermost elements are adjacent.
  Splits(std::string name, std::vector<Split> splits);

  bool empty() const { return splits_.empty(); }
  const std::string& name() const { return name_; }
  i64 experts() const { return begins_.empty() ? 0 : begins_.back(); }
  i64 rank() const { return static_cast<i64>(splits_.front().shape.size()); }
  i64 extent(i64 dimension) const { return splits_.front().shape[dimension]; }  // of dimensions 1 and above
  Element element() const { return splits_.front().element; }
  i32 device() const { return splits_.front().device; }

  // What belongs to one expert: its address, and the elements between two of its rows (of a rank 3 tensor).
  const u8* at(i64 expert) const;
  i64 row_stride(i64 expert) const;

  // "gate[2]", or the name alone for a single tensor: the split that holds the expert.
  std::string name_of(i64 expert) const;

 private:
  std::size_t find(i64 expert) const;

  std::string name_;
  std::vector<Split> splits_;
  std::vector<i64> begins_;  // end of each split: experts in it and before it
};

}  // namespace fourmoe::weights
