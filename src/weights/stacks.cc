#include "weights/stacks.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <mutex>

#include "format/validate.h"
#include "status.h"

namespace fourmoe::weights {
namespace {

using format::Encoding;
using format::Matrix;

// What assemble() keeps alive: biases, which the rooms read as f32.
struct Owned {
  std::vector<f32> biases;
};

[[noreturn]] void refuse_argument(const std::string& detail) { throw Error(Reason::argument_invalid, detail); }

void require_shape(const Splits& splits, std::initializer_list<i64> rest, const char* why) {
  bool same = splits.rank() == static_cast<i64>(rest.size()) + 1;
  std::string found = "[experts";
  std::string expected = found;
  for (i64 d = 1; d < splits.rank(); ++d) found += fmt::format(", {}", splits.extent(d));
  i64 d = 1;
  for (const i64 extent : rest) {
    same = same && splits.extent(d++) == extent;
    expected += fmt::format(", {}", extent);
  }
  if (!same) refuse_argument(fmt::format("{} is {}], expected {}] {}", splits.name(), found, expected, why));
}

void require_element(const Splits& splits, std::initializer_list<Element> allowed) {
  std::string names;
  for (const Element element : allowed) {
    if (splits.element() == element) return;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", element_name(element));
  }
  throw Error(Reason::dtype_unsupported,
              fmt::format("{} is {}, expected {}", splits.name(), element_name(splits.element()), names));
}

Encoding encoding_of(const Stack& stack) {
  const Splits& codes = stack.codes;
  require_element(codes, {Element::u8, Element::f32, Element::f16, Element::bf16, Element::e4m3});
  if (codes.rank() != 3) {
    refuse_argument(
        fmt::format("{} has {} dimensions, expected 3: [experts, rows, columns]", codes.name(), codes.rank()));
  }
  if (codes.element() != Element::u8) {
    if (!stack.scales.empty()) {
      refuse_argument(fmt::format("{} is given, but {} is {}; only u8 codes have block scales", stack.scales.name(),
                                  codes.name(), element_name(codes.element())));
    }
    switch (codes.element()) {
      case Element::f32: return Encoding::f32;
      case Element::f16: return Encoding::f16;
      case Element::bf16: return Encoding::bf16;
      default: return Encoding::fp8;
    }
  }
  if (stack.scales.empty()) {
    refuse_argument(
        fmt::format("{} is u8, so its block scales are needed: {}_scale is missing", codes.name(), codes.name()));
  }
  require_element(stack.scales, {Element::e4m3, Element::e8m0, Element::u8});
  if (stack.scales.element() == Element::e4m3) return Encoding::nvfp4;
  if (stack.scales.element() == Element::e8m0) return Encoding::mxfp4;
  const bool of_32 = stack.scales.rank() == 3 && stack.scales.extent(2) * 16 == codes.extent(2);
  return of_32 ? Encoding::mxfp4 : Encoding::nvfp4;
}

// One projection, checked: experts, shapes and element types fit.
struct Projection {
  const Stack* stack;
  Encoding encoding;
  i32 rows;
  i32 cols;
  std::vector<u8> globals;  // [experts] f32; empty: 1
  std::vector<u8> bias;     // [experts, rows] of the stack's element type; empty for none
};

Projection examine(const Stack& stack) {
  const Encoding encoding = encoding_of(stack);
  const i64 rows = stack.codes.extent(1);
  const i64 cols = stack.codes.extent(2) * (format::is_fp4(encoding) ? 2 : 1);
  constexpr i64 kMost = i64{1} << 20;  // flow.cc refuses more; here it keeps the sizes in 32 bits
  if (rows > kMost || cols > kMost) {
    refuse_argument(
        fmt::format("{} has {} rows and {} columns, expected up to {}", stack.codes.name(), rows, cols, kMost));
  }
  return {&stack, encoding, static_cast<i32>(rows), static_cast<i32>(cols), {}, {}};
}

void require_count(const Splits& splits, i64 experts, const Splits& of) {
  if (splits.empty() || splits.experts() == experts) return;
  refuse_argument(fmt::format("{} is for {} experts, {} for {}", splits.name(), splits.experts(), of.name(), experts));
}

f32 number(const std::vector<u8>& numbers, i64 index) { return format::load<f32>(numbers.data() + 4 * index); }

// Checks what goes with the codes, and fills in what is read on the host.
void complete(Projection* projection, i64 experts) {
  Projection& p = *projection;
  const Stack& stack = *p.stack;
  require_count(stack.scales, experts, stack.codes);
  require_count(stack.globals, experts, stack.codes);
  require_count(stack.bias, experts, stack.codes);
  if (!stack.scales.empty()) {
    require_shape(stack.scales, {p.rows, p.cols / format::block_of(p.encoding)},
                  fmt::format("to go with {}", stack.codes.name()).c_str());
  }
  if (!stack.globals.empty()) {
    require_element(stack.globals, {Element::f32});
    require_shape(stack.globals, {}, "");
    p.globals = stack.globals.copy();
    if (p.encoding == Encoding::mxfp4) {
      for (i64 e = 0; e < experts; ++e) {
        if (number(p.globals, e) == 1.0f) continue;
        refuse_argument(fmt::format("{} is given, but mxfp4 has no global scale", stack.globals.name()));
      }
    }
  }
  if (!stack.bias.empty()) {
    require_element(stack.bias, {Element::f32, Element::f16, Element::bf16});
    require_shape(stack.bias, {p.rows}, fmt::format("to go with {}", stack.codes.name()).c_str());
    p.bias = stack.bias.copy();
  }
}

// Number `expert` of a tensor, of which `numbers` is a copy.
f32 global_of(const Splits& splits, const std::vector<u8>& numbers, i64 expert) {
  const f32 value = number(numbers, expert);
  if (value > 0.0f && value < INFINITY) return value;
  throw Error(Reason::global_invalid,
              fmt::format("{}, expert {}, is {}, expected finite and above 0", splits.name_of(expert), expert, value));
}

Matrix matrix_of(const Projection& p, i64 expert) {
  const Stack& stack = *p.stack;
  Matrix matrix;
  matrix.data = stack.codes.at(expert);
  matrix.data_stride = stack.codes.row_stride(expert) * element_bytes(stack.codes.element());
  matrix.rows = p.rows;
  matrix.cols = p.cols;
  matrix.encoding = p.encoding;
  if (!stack.globals.empty()) matrix.global = global_of(stack.globals, p.globals, expert);
  const i64 least = format::row_bytes(p.encoding, p.cols);
  if (matrix.data_stride < least && p.rows > 1) {
    throw Error(Reason::stride_unsupported, fmt::format("{} has rows {} bytes apart, expected at least {}",
                                                        stack.codes.name_of(expert), matrix.data_stride, least));
  }
  if (stack.scales.empty()) return matrix;
  matrix.scales = stack.scales.at(expert);
  matrix.scales_stride = stack.scales.row_stride(expert);
  const i64 blocks = p.cols / format::block_of(p.encoding);
  if (matrix.scales_stride < blocks && p.rows > 1) {
    throw Error(Reason::stride_unsupported, fmt::format("{} has rows {} bytes apart, expected at least {}",
                                                        stack.scales.name_of(expert), matrix.scales_stride, blocks));
  }
  if (!stack.scales.on_host(expert)) return matrix;
  if (const auto bad = format::find_bad_scale(matrix)) {
    throw Error(Reason::scale_invalid,
                fmt::format("{}, expert {}, has 0x{:02x} at [{}, {}]: NaN or negative", stack.scales.name_of(expert),
                            expert, bad->byte, bad->row, bad->block));
  }
  return matrix;
}

// The bias of one expert as f32 at `out`; null when there is none.
const f32* widen_bias(const Projection& p, i64 expert, f32* out) {
  const Splits& bias = p.stack->bias;
  if (bias.empty()) return nullptr;
  const format::Dtype dtype = bias.element() == Element::f32   ? format::Dtype::f32
                              : bias.element() == Element::f16 ? format::Dtype::f16
                                                               : format::Dtype::bf16;
  const u8* row = p.bias.data() + expert * p.rows * element_bytes(bias.element());
  for (i32 r = 0; r < p.rows; ++r) out[r] = format::read(row, dtype, r);
  return out;
}

// A copy of input_scale or inter_scale; empty where it is not given.
std::vector<u8> input_globals(const Splits& splits, i64 experts, const Splits& of) {
  if (splits.empty()) return {};
  require_element(splits, {Element::f32});
  require_shape(splits, {}, "");
  if (splits.experts() != 1) require_count(splits, experts, of);
  return splits.copy();
}

f32 input_global(const Splits& splits, const std::vector<u8>& numbers, i64 expert) {
  if (splits.empty()) return 1.0f;
  return global_of(splits, numbers, splits.experts() == 1 ? 0 : expert);
}

void check_agreement(const Projection& up, const Projection& other, i32 rows, i32 cols) {
  const Splits& codes = other.stack->codes;
  require_count(codes, up.stack->codes.experts(), up.stack->codes);
  if (other.encoding != up.encoding) {
    throw Error(
        Reason::encoding_unsupported,
        fmt::format("{} is {} but {} is {}; one encoding for all projections would pass", codes.name(),
                    format::encoding_name(other.encoding), up.stack->codes.name(), format::encoding_name(up.encoding)));
  }
  if (other.rows == rows && other.cols == cols) return;
  refuse_argument(fmt::format("{} is [{}, {}], expected [{}, {}] to go with up [{}, {}] (columns unpacked)",
                              codes.name(), other.rows, other.cols, rows, cols, up.rows, up.cols));
}

// Keeps the error of the lowest expert, so that what is reported does not depend on threads.
class FirstError {
 public:
  void keep(i64 expert, const Error& error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (error_ != nullptr && expert_ < expert) return;
    error_ = std::make_unique<Error>(error);
    expert_ = expert;
  }
  void rethrow() const {
    if (error_ != nullptr) throw Error(*error_);
  }

 private:
  std::mutex mutex_;
  i64 expert_ = -1;
  std::unique_ptr<Error> error_;
};

}  // namespace

Assembled assemble(const Stacks& stacks, bool gated, Executor& executor) {
  if (stacks.up.codes.empty()) refuse_argument("up is missing");
  if (stacks.down.codes.empty()) refuse_argument("down is missing");
  if (gated == stacks.gate.codes.empty()) {
    refuse_argument(gated ? "gate is missing; only relu2 has none" : "gate is given, but relu2 has none");
  }
  Projection up = examine(stacks.up);
  Projection down = examine(stacks.down);
  Projection gate = gated ? examine(stacks.gate) : up;
  const i64 experts = stacks.up.codes.experts();
  check_agreement(up, gate, up.rows, up.cols);
  check_agreement(up, down, up.cols, up.rows);
  for (Projection* p : {&up, &gate, &down}) complete(p, experts);
  const std::vector<u8> inputs = input_globals(stacks.input_scale, experts, stacks.up.codes);
  const std::vector<u8> inters = input_globals(stacks.inter_scale, experts, stacks.up.codes);

  Assembled out;
  out.encoding = up.encoding;
  out.hidden = up.cols;
  out.inter = up.rows;
  out.experts.resize(experts);
  auto owned = std::make_shared<Owned>();
  const i64 biases_each = 2 * i64{up.rows} + down.rows;
  const bool biased = !stacks.up.bias.empty() || !stacks.down.bias.empty() || (gated && !stacks.gate.bias.empty());
  if (biased) owned->biases.resize(experts * biases_each);
  FirstError first_error;
  executor.parallel_for(experts, [&](i64 e) {
    try {
      Expert& expert = out.experts[e];
      f32* biases = owned->biases.data() + (biased ? e * biases_each : 0);
      if (gated) expert.gate = matrix_of(gate, e);
      expert.up = matrix_of(up, e);
      expert.down = matrix_of(down, e);
      if (gated) expert.gate_bias = widen_bias(gate, e, biases);
      expert.up_bias = widen_bias(up, e, biases + up.rows);
      expert.down_bias = widen_bias(down, e, biases + 2 * i64{up.rows});
      expert.input_scale = input_global(stacks.input_scale, inputs, e);
      expert.inter_scale = input_global(stacks.inter_scale, inters, e);
    } catch (const Error& error) {
      first_error.keep(e, error);
    }
  });
  first_error.rethrow();
  out.owner = owned;
  return out;
}

}  // namespace fourmoe::weights
