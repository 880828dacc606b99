#include "weights/splits.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "gpu/runtime.h"
#include "status.h"

namespace fourmoe::weights {
namespace {

std::string label(const std::string& name, std::size_t index, std::size_t count) {
  return count == 1 ? name : fmt::format("{}[{}]", name, index);
}

std::string device_words(i32 device) { return device < 0 ? "cpu" : fmt::format("cuda:{}", device); }

bool same_but_first(const std::vector<i64>& a, const std::vector<i64>& b) {
  return a.size() == b.size() && !a.empty() && std::equal(a.begin() + 1, a.end(), b.begin() + 1);
}

std::string expected_shape(const std::vector<i64>& shape) {
  std::string words = "[experts";
  for (std::size_t d = 1; d < shape.size(); ++d) words += fmt::format(", {}", shape[d]);
  return words + "]";
}

void check_one(const std::string& what, const Split& split, i32 device) {
  if (split.shape.empty() || split.shape[0] < 1) {
    throw Error(Reason::argument_invalid, fmt::format("{} is [{}], expected at least one expert in its first dimension",
                                                      what, fmt::join(split.shape, ", ")));
  }
  const bool adjacent = split.shape.size() == 1 || split.shape.back() <= 1 || split.strides.back() == 1;
  if (!adjacent) {
    throw Error(Reason::stride_unsupported,
                fmt::format("{} has elements of a row {} apart, expected adjacent ones", what, split.strides.back()));
  }
  if (split.device >= 0 && split.device != device) {
    const std::string also = device < 0 ? "" : " or " + device_words(device);
    throw Error(Reason::memory_misplaced,
                fmt::format("{} is on {}, expected cpu{}, where the layer is", what, device_words(split.device), also));
  }
}

void check_same(const std::string& what, const Split& split, const std::string& first_name, const Split& first) {
  if (!same_but_first(split.shape, first.shape)) {
    throw Error(Reason::argument_invalid,
                fmt::format("{} is [{}], expected {} as in {}", what, fmt::join(split.shape, ", "),
                            expected_shape(first.shape), first_name));
  }
  if (split.element != first.element) {
    throw Error(Reason::dtype_unsupported,
                fmt::format("{} is {}, expected {} as in {}", what, element_name(split.element),
                            element_name(first.element), first_name));
  }
}

// Copies one split to host memory, `each` bytes an expert.
void copy_split(const std::string& name, const Split& split, i64 each, u8* to) {
  const i64 count = split.shape[0];
  const i64 stride = split.strides[0] * element_bytes(split.element);
  if (split.device < 0) {
    for (i64 e = 0; e < count; ++e) std::memcpy(to + e * each, split.data + e * stride, each);
    return;
  }
  const gpu::Current current(split.device);
  throw_unless_ok(current.status());
  const i64 at_once = stride == each ? count : 1;
  for (i64 e = 0; e < count; e += at_once) {
    throw_unless_ok(gpu::copy(to + e * each, split.data + e * stride, at_once * each, nullptr, name.c_str()));
  }
  throw_unless_ok(gpu::synchronise(nullptr));
}

}  // namespace

std::string_view element_name(Element element) {
  switch (element) {
    case Element::f32: return "f32";
    case Element::f16: return "f16";
    case Element::bf16: return "bf16";
    case Element::i32: return "i32";
    case Element::i64: return "i64";
    case Element::u8: return "u8";
    case Element::e4m3: return "float8_e4m3fn";
    case Element::e8m0: return "float8_e8m0fnu";
    case Element::other: return "another type";
  }
  return "unknown";
}

i64 element_bytes(Element element) {
  switch (element) {
    case Element::f32:
    case Element::i32: return 4;
    case Element::f16:
    case Element::bf16: return 2;
    case Element::i64: return 8;
    case Element::u8:
    case Element::e4m3:
    case Element::e8m0:
    case Element::other: return 1;
  }
  return 1;
}

Splits::Splits(std::string name, std::vector<Split> splits, i32 device)
    : name_(std::move(name)), splits_(std::move(splits)) {
  if (splits_.empty()) {
    throw Error(Reason::argument_invalid, fmt::format("{} is an empty list, expected at least one tensor", name_));
  }
  i64 experts = 0;
  for (std::size_t i = 0; i < splits_.size(); ++i) {
    const std::string what = label(name_, i, splits_.size());
    check_one(what, splits_[i], device);
    check_same(what, splits_[i], label(name_, 0, splits_.size()), splits_[0]);
    begins_.push_back(experts += splits_[i].shape[0]);
  }
}

std::size_t Splits::find(i64 expert) const {
  return static_cast<std::size_t>(std::upper_bound(begins_.begin(), begins_.end(), expert) - begins_.begin());
}

const u8* Splits::at(i64 expert) const {
  const std::size_t index = find(expert);
  const Split& split = splits_[index];
  const i64 local = expert - (begins_[index] - split.shape[0]);
  return split.data + local * split.strides[0] * element_bytes(split.element);
}

i64 Splits::row_stride(i64 expert) const { return splits_[find(expert)].strides[1]; }

bool Splits::on_host(i64 expert) const { return splits_[find(expert)].device < 0; }

std::vector<u8> Splits::copy() const {
  i64 each = element_bytes(element());
  for (i64 d = 1; d < rank(); ++d) each *= extent(d);
  std::vector<u8> all(static_cast<std::size_t>(experts() * each));
  for (std::size_t i = 0; i < splits_.size() && each > 0; ++i) {
    copy_split(name_, splits_[i], each, all.data() + (begins_[i] - splits_[i].shape[0]) * each);
  }
  return all;
}

std::string Splits::name_of(i64 expert) const { return label(name_, find(expert), splits_.size()); }

}  // namespace fourmoe::weights
