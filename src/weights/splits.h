// Splits: a tensor of weights given as a list of tensors along the expert dimension.
//
// A layer's experts may lie in any number of tensors of any sizes: one stack, one a rank, one an expert; those of a
// layer on a GPU in host memory or in that GPU's, each split as it likes. Nothing is copied: split i holds experts
// [begin_i, begin_i + shape[0]). A list is checked as a whole before anything reads it.
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

  // `device` is where the layer lives: -1, or a GPU. Throws Error(argument_invalid, dtype_unsupported,
  // stride_unsupported or memory_misplaced) naming the split ("gate[2]", or "gate" for a single tensor), what was
  // expected and what was found: a list has at least one split, each holds at least one expert and lies in host memory
  // or in that of `device`, all agree in element type and every dimension but the first, and innermost elements are
  // adjacent.
  Splits(std::string name, std::vector<Split> splits, i32 device = -1);

  bool empty() const { return splits_.empty(); }
  const std::string& name() const { return name_; }
  i64 experts() const { return begins_.empty() ? 0 : begins_.back(); }
  i64 rank() const { return static_cast<i64>(splits_.front().shape.size()); }
  i64 extent(i64 dimension) const { return splits_.front().shape[dimension]; }  // of dimensions 1 and above
  Element element() const { return splits_.front().element; }

  // What belongs to one expert: its address, and the elements between two of its rows (of a rank 3 tensor).
  const u8* at(i64 expert) const;
  i64 row_stride(i64 expert) const;
  bool on_host(i64 expert) const;

  // The elements of all experts in host memory, one after the other, of a tensor of rank 1 or 2. Waits for what it
  // copies from a GPU: for small tensors. Throws Error(device_failed).
  std::vector<u8> copy() const;

  // "gate[2]", or the name alone for a single tensor: the split that holds the expert.
  std::string name_of(i64 expert) const;

 private:
  std::size_t find(i64 expert) const;

  std::string name_;
  std::vector<Split> splits_;
  std::vector<i64> begins_;  // end of each split: experts in it and before it
};

}  // namespace fourmoe::weights
