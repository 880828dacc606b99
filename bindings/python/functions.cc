#include "bindings/python/functions.h"

#include <fmt/format.h>
#include <nanobind/stl/filesystem.h>

#include <cmath>

#include "bindings/python/array.h"
#include "bindings/python/keywords.h"
#include "bindings/python/pack.h"
#include "bindings/python/unlocked.h"
#include "checkpoint/checkpoint.h"
#include "flow.h"
#include "format/quantise.h"
#include "format/row_order.h"
#include "format/scale_layout.h"
#include "route/route.h"
#include "status.h"
#include "weights/quantise.h"

namespace fourmoe::python {
namespace {

[[noreturn]] void refuse_argument(const std::string& detail) { throw Error(Reason::argument_invalid, detail); }

std::vector<i64> shape_of(const Array& array) { return {array.shape.begin(), array.shape.begin() + array.rank}; }

constexpr i64 kMostTokens = 1 << 24;  // that one call of route takes

// A contiguous array in host memory of at least `least` dimensions.
Array host(const char* name, nb::handle object, i32 least) {
  Array array = view(name, object);
  if (array.device >= 0) refuse_argument(fmt::format("{} is on {}, expected cpu", name, device_words(array.device)));
  if (array.rank < least) {
    refuse_argument(fmt::format("{} has {} dimensions, expected at least {}", name, array.rank, least));
  }
  if (array.count() == 0) return array;
  i64 contiguous = 1;
  for (i32 d = array.rank - 1; d >= 0; --d) {
    if (array.strides[d] != contiguous && array.shape[d] > 1) {
      throw Error(Reason::stride_unsupported, fmt::format("{} is not contiguous", name));
    }
    contiguous *= array.shape[d];
  }
  return array;
}

template <class T>
T* data_of(const nb::object& made) {
  return reinterpret_cast<T*>(view("result", made, Access::write).data);
}

format::Encoding dense_encoding(const Array& array) {
  switch (array.element) {
    case Element::f32: return format::Encoding::f32;
    case Element::f16: return format::Encoding::f16;
    case Element::bf16: return format::Encoding::bf16;
    default:
      throw Error(Reason::dtype_unsupported,
                  fmt::format("{} is {}, expected f32, f16, bf16", array.name, weights::element_name(array.element)));
  }
}

format::Matrix matrix_of(const Array& values, i64 index) {
  format::Matrix matrix;
  matrix.encoding = dense_encoding(values);
  matrix.rows = static_cast<i32>(values.shape[values.rank - 2]);
  matrix.cols = static_cast<i32>(values.shape[values.rank - 1]);
  matrix.data_stride = format::row_bytes(matrix.encoding, matrix.cols);
  matrix.data = values.data + index * matrix.rows * matrix.data_stride;
  return matrix;
}

i64 matrices_in(const Array& array) {
  i64 count = 1;
  for (i32 d = 0; d + 2 < array.rank; ++d) count *= array.shape[d];
  return count;
}

// "values[1, 0]": one matrix of many.
std::string name_of(const Array& array, i64 index) {
  std::string words;
  for (i32 d = array.rank - 3; d >= 0; --d) {
    words = fmt::format("{}{}{}", index % array.shape[d], words.empty() ? "" : ", ", words);
    index /= array.shape[d];
  }
  return words.empty() ? array.name : fmt::format("{}[{}]", array.name, words);
}

// One global a matrix: an array of `count` f32, a number for all of them, or none (then empty).
std::vector<f32> read_globals(nb::handle object, i64 count) {
  if (object.is_none()) return {};
  std::vector<f32> globals;
  f32 number = 0;
  if (nb::try_cast(object, number)) {
    globals.assign(static_cast<std::size_t>(count), number);
  } else {
    const Array array = host("global_scale", object, 0);
    if (array.element != Element::f32 || array.count() != count) {
      refuse_argument(fmt::format("global_scale has {} elements of {}, expected {} of f32", array.count(),
                                  weights::element_name(array.element), count));
    }
    const f32* values = reinterpret_cast<const f32*>(array.data);
    globals.assign(values, values + count);
  }
  for (const f32 global : globals) {
    if (!(global > 0.0f && global < INFINITY)) {
      throw Error(Reason::global_invalid, fmt::format("global_scale is {}, expected finite and above 0", global));
    }
  }
  return globals;
}

// Block of a 4-bit row from the columns of its codes (pairs) and its scales.
i64 block_of(const Array& codes, const Array& scales) {
  const i64 columns = codes.shape[codes.rank - 1] * 2;
  const i64 blocks = scales.shape[scales.rank - 1];
  bool same = codes.rank == scales.rank;
  for (i32 d = 0; same && d + 1 < codes.rank; ++d) same = codes.shape[d] == scales.shape[d];
  if (same && columns == 16 * blocks) return 16;
  if (same && columns == 32 * blocks && scales.element != Element::e4m3) return 32;
  refuse_argument(
      fmt::format("scales has {} columns for {} values a row, expected {} (blocks of 16, E4M3) or {} (blocks "
                  "of 32, E8M0) and the codes' other dimensions",
                  blocks, columns, columns / 16, columns / 32));
}

}  // namespace

std::vector<i32> layers(const nb::object& path) {
  std::filesystem::path converted;
  if (!nb::try_cast(path, converted)) refuse_argument("path is not a path");
  const Unlocked unlocked;
  return checkpoint::Checkpoint::open(converted).layers();
}

std::tuple<nb::object, nb::object, nb::object> quantize(nb::handle object, nb::handle global_scale) {
  const Array values = host("values", object, 2);
  const i64 columns = values.shape[values.rank - 1];
  if (columns % format::kNvfp4Block != 0 || columns == 0) {
    throw Error(Reason::shape_unsupported,
                fmt::format("values has {} columns, expected a positive multiple of 16", columns));
  }
  dense_encoding(values);
  const i64 count = matrices_in(values);
  std::vector<f32> globals = read_globals(global_scale, count);
  std::vector<i64> shape = shape_of(values);
  shape.back() = columns / 2;
  nb::object codes = empty_like(object, shape, Element::u8);
  shape.back() = columns / format::kNvfp4Block;
  nb::object scales = empty_like(object, shape, Element::u8);
  shape.resize(shape.size() - 2);
  nb::object made_globals = empty_like(object, shape, Element::f32);
  u8* out_codes = data_of<u8>(codes);
  u8* out_scales = data_of<u8>(scales);
  f32* out_globals = data_of<f32>(made_globals);
  {
    const Unlocked unlocked;
    Executor& executor = tbb_executor();
    for (i64 i = 0; i < count; ++i) {
      const format::Matrix matrix = matrix_of(values, i);
      const i64 size = i64{matrix.rows} * matrix.cols;
      const f32 amax = weights::find_amax(matrix, name_of(values, i), executor);
      out_globals[i] = globals.empty() ? weights::global_of(amax) : globals[i];
      weights::quantise(matrix, out_globals[i], executor, out_codes + i * size / 2, out_scales + i * size / 16);
    }
  }
  return {back_to(object, codes), back_to(object, scales), back_to(object, made_globals)};
}

nb::object decode(nb::handle codes_object, nb::handle scales_object, nb::handle global_scale) {
  const Array codes = host("codes", codes_object, 2);
  const Array scales = host("scales", scales_object, 2);
  if (codes.element != Element::u8) {
    throw Error(Reason::dtype_unsupported,
                fmt::format("codes is {}, expected u8", weights::element_name(codes.element)));
  }
  if (scales.element != Element::u8 && scales.element != Element::e4m3 && scales.element != Element::e8m0) {
    throw Error(Reason::dtype_unsupported,
                fmt::format("scales is {}, expected u8 or an 8-bit float", weights::element_name(scales.element)));
  }
  const i64 block = block_of(codes, scales);
  const i64 count = matrices_in(codes);
  const std::vector<f32> globals = read_globals(global_scale, count);
  std::vector<i64> shape = shape_of(codes);
  shape.back() *= 2;
  nb::object made = empty_like(codes_object, shape, Element::f32);
  f32* out = data_of<f32>(made);
  {
    const Unlocked unlocked;
    const i64 size = codes.shape[codes.rank - 2] * shape.back();
    for (i64 i = 0; i < count * size; ++i) {
      const u8 byte = scales.data[i / block];
      const f32 scale = block == 16 ? format::from_e4m3(byte) : format::from_e8m0(byte);
      const f32 value = format::from_e2m1(format::code_at(codes.data, i)) * scale;
      out[i] = globals.empty() ? value : value * globals[i / size];
    }
  }
  return back_to(codes_object, made);
}

std::tuple<nb::object, nb::object> route_logits(const nb::dict& dictionary) {
  const Keywords given(dictionary);
  const nb::object object = given.object("router_logits");
  Problem p;
  p.routing = read_routing(given);
  route::In in;
  if (object.is_none()) refuse_argument("router_logits is None");
  std::vector<nb::object> owners;
  in.logits = matrix("router_logits", object, -1, {Element::f32, Element::f16, Element::bf16}, &owners);
  const i64 tokens = in.logits.rows;
  if (tokens > kMostTokens) {
    refuse_argument(fmt::format("router_logits has {} rows, expected at most {}", tokens, kMostTokens));
  }
  p.experts = p.local_experts = static_cast<i32>(std::min<i64>(in.logits.cols, 1 << 20));
  p.top_k = given.get("top_k", 0);
  p.hidden = p.inter = 16;  // routing depends on neither
  p.max_tokens = static_cast<i32>(tokens);
  if (const Verdict verdict = check(p); !verdict.accepted()) throw Error(verdict.reason, verdict.detail);
  Array bias;
  const bool biased = given.has("selection_bias");
  if (biased) bias = host("selection_bias", given.object("selection_bias"), 1);
  if (biased && (bias.element != Element::f32 || bias.count() != p.experts)) {
    refuse_argument(fmt::format("selection_bias has {} elements of {}, expected {} of f32", bias.count(),
                                weights::element_name(bias.element), p.experts));
  }
  in.bias = reinterpret_cast<const f32*>(bias.data);
  if (biased) throw_unless_ok(route::check_bias({in.bias, static_cast<std::size_t>(p.experts)}));
  nb::object ids = empty_like(object, {tokens, p.top_k}, Element::i32);
  nb::object weights = empty_like(object, {tokens, p.top_k}, Element::f32);
  route::Out out;
  out.ids = data_of<i32>(ids);
  out.weights = data_of<f32>(weights);
  Status status;
  {
    const Unlocked unlocked;
    status = route::pick(p, in, p.max_tokens, tbb_executor(), out);
  }
  throw_unless_ok(status);
  return {back_to(object, ids), back_to(object, weights)};
}

std::tuple<nb::object, nb::object> split_gate_up(nb::handle object, i64 group, bool up_first) {
  const Array fused = host("tensor", object, 2);
  const i64 rows = fused.shape[1] / 2;
  if (fused.shape[1] % 2 != 0 || rows == 0) {
    throw Error(Reason::shape_unsupported,
                fmt::format("tensor has {} rows, expected a positive even number", fused.shape[1]));
  }
  if (group == 0) group = rows;
  if (group < 0 || rows % group != 0) {
    throw Error(Reason::shape_unsupported,
                fmt::format("group is {}, expected a divisor of {}, half the tensor's rows", group, rows));
  }
  const bool scales = fused.element == Element::e4m3 || fused.element == Element::e8m0;
  const Element element = scales ? Element::u8 : fused.element;
  if (element == Element::other) {  // of no known size
    throw Error(Reason::dtype_unsupported,
                "tensor is another type, expected f32, f16, bf16, i32, i64, u8 or an 8-bit float of scales");
  }
  std::vector<i64> shape = shape_of(fused);
  shape[1] = rows;
  nb::object gate = empty_like(object, shape, element);
  nb::object up = empty_like(object, shape, element);
  u8* out_gate = data_of<u8>(gate);
  u8* out_up = data_of<u8>(up);
  i64 bytes = weights::element_bytes(fused.element);
  for (i32 d = 2; d < fused.rank; ++d) bytes *= fused.shape[d];
  {
    const Unlocked unlocked;
    const format::RowOrder order{group, up_first};
    for (i64 i = 0; i < fused.shape[0] * rows; ++i) {
      const u8* expert = fused.data + i / rows * 2 * rows * bytes;
      std::memcpy(out_gate + i * bytes, expert + order.gate_row(i % rows) * bytes, bytes);
      std::memcpy(out_up + i * bytes, expert + order.up_row(i % rows) * bytes, bytes);
    }
  }
  return {back_to(object, gate), back_to(object, up)};
}

nb::object linear_scales(nb::handle object) {
  const Array given = view("scales", object);
  const bool bytes = given.element == Element::u8 || given.element == Element::e4m3;
  if (given.device >= 0 || !bytes || given.rank != 6 || given.shape[0] != 32 || given.shape[1] != 4 ||
      given.shape[3] != 4) {
    refuse_argument(
        fmt::format("scales has {} dimensions of {} on {}, expected [32, 4, rows/128, 4, blocks/4, experts] "
                    "of u8 or float8_e4m3fn on cpu",
                    given.rank, weights::element_name(given.element), device_words(given.device)));
  }
  format::AtomView atoms;
  atoms.data = given.data;
  for (std::size_t d = 0; d < 6; ++d) {
    atoms.shape[d] = given.shape[d];
    atoms.strides[d] = given.strides[d];
  }
  nb::object made = empty_like(object, {atoms.matrices(), atoms.rows(), atoms.blocks()}, Element::u8);
  u8* out = data_of<u8>(made);
  {
    const Unlocked unlocked;
    for (i64 m = 0; m < atoms.matrices(); ++m) format::read_linear(atoms, m, out + m * atoms.rows() * atoms.blocks());
  }
  return back_to(object, made);
}

}  // namespace fourmoe::python
