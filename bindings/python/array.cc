#include "bindings/python/array.h"

#include <fmt/format.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <string_view>

#include "bindings/python/exchange.h"
#include "bindings/python/unlocked.h"
#include "gpu/runtime.h"
#include "status.h"

namespace fourmoe::python {
namespace {

std::string type_words(nb::handle object) { return nb::type_name(object.type()).c_str(); }

Element element_of(u8 code, u8 bits, u16 lanes) {
  using Code = nb::dlpack::dtype_code;
  if (static_cast<Code>(code) == Code::Float4_E2M1FN && bits * lanes == 8) return Element::u8;  // a pair of codes
  if (lanes != 1) return Element::other;
  switch (static_cast<Code>(code)) {
    case Code::Float: return bits == 32 ? Element::f32 : bits == 16 ? Element::f16 : Element::other;
    case Code::Bfloat: return bits == 16 ? Element::bf16 : Element::other;
    case Code::Int: return bits == 32 ? Element::i32 : bits == 64 ? Element::i64 : Element::other;
    case Code::UInt: return bits == 8 ? Element::u8 : Element::other;
    case Code::Float8_E4M3FN: return Element::e4m3;
    case Code::Float8_E8M0FNU: return Element::e8m0;
    default: return Element::other;
  }
}

struct Format {
  u8 code;
  u8 bits;
  const char* name;  // of the element type in torch, numpy, cupy and jax
};

Format format_of(Element element) {
  using Code = nb::dlpack::dtype_code;
  switch (element) {
    case Element::f16: return {static_cast<u8>(Code::Float), 16, "float16"};
    case Element::bf16: return {static_cast<u8>(Code::Bfloat), 16, "bfloat16"};
    case Element::i32: return {static_cast<u8>(Code::Int), 32, "int32"};
    case Element::i64: return {static_cast<u8>(Code::Int), 64, "int64"};
    case Element::u8: return {static_cast<u8>(Code::UInt), 8, "uint8"};
    default: return {static_cast<u8>(Code::Float), 32, "float32"};
  }
}

// The exchange API of a type, or null. Each thread remembers the last type that it asked.
const exchange::Api* api_of_type(nb::handle asked) {
  thread_local PyObject* last_type = nullptr;
  thread_local const exchange::Api* last_api = nullptr;
  PyObject* type = asked.ptr();
  if (type == last_type) return last_api;
  const exchange::Api* api = nullptr;
  if (const nb::object capsule = nb::getattr(asked, "__dlpack_c_exchange_api__", nb::object());
      capsule.is_valid() && PyCapsule_IsValid(capsule.ptr(), exchange::kCapsule)) {
    api = static_cast<const exchange::Api*>(PyCapsule_GetPointer(capsule.ptr(), exchange::kCapsule));
    if (api->header.version.major != 1 || api->borrow == nullptr) api = nullptr;
  }
  Py_INCREF(type);  // a remembered type stays alive, so its address names no other one
  Py_XDECREF(last_type);
  last_type = type;
  last_api = api;
  return api;
}

const exchange::Api* api_of(nb::handle object) { return api_of_type(object.type()); }

void set_device(const char* name, i32 type, i32 index, Array* out) {
  switch (type) {
    case exchange::kCpu:
    case exchange::kCudaHost: out->device = -1; return;
    case exchange::kCuda:
    case exchange::kCudaManaged: out->device = index; return;
    default:
      throw Error(Reason::argument_invalid,
                  fmt::format("{} is on a device of DLPack type {}, expected cpu or cuda", name, type));
  }
}

void set_shape(const char* name, i64 rank, const i64* shape, const i64* strides, Array* out) {
  if (rank > kMostDimensions) {
    throw Error(Reason::argument_invalid,
                fmt::format("{} has {} dimensions, expected at most {}", name, rank, kMostDimensions));
  }
  out->rank = static_cast<i32>(rank);
  i64 contiguous = 1;
  for (i64 d = rank - 1; d >= 0; --d) {
    out->shape[d] = shape[d];
    out->strides[d] = strides != nullptr ? strides[d] : contiguous;
    contiguous *= shape[d];
  }
}

Array view_borrowed(const char* name, nb::handle object, const exchange::Api& api) {
  exchange::Tensor tensor{};
  if (api.borrow(object.ptr(), &tensor) != 0) {
    const nb::python_error error;
    const std::string words = nb::str(error.value()).c_str();
    throw Error(Reason::argument_invalid, fmt::format("{} is {}, expected a tensor on cpu or cuda: {}", name,
                                                      type_words(object), words.substr(0, words.find('\n'))));
  }
  Array out;
  out.name = name;
  out.data = static_cast<u8*>(tensor.data) + (tensor.data != nullptr ? tensor.byte_offset : 0);
  out.element = element_of(tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes);
  set_device(name, tensor.device.type, tensor.device.index, &out);
  set_shape(name, tensor.rank, tensor.shape, tensor.strides, &out);
  return out;
}

template <class Import>
Array view_imported(const char* name, const Import& import, nb::object owner) {
  Array out;
  out.name = name;
  out.data = static_cast<u8*>(const_cast<void*>(static_cast<const void*>(import.data())));
  out.element = element_of(static_cast<u8>(import.dtype().code), import.dtype().bits, import.dtype().lanes);
  set_device(name, import.device_type(), import.device_id(), &out);
  set_shape(name, static_cast<i64>(import.ndim()), import.shape_ptr(), import.stride_ptr(), &out);
  out.owner = std::move(owner);
  return out;
}

// numpy has no bf16 or 8-bit floats of its own: arrays of ml_dtypes are read as integers of the same width.
std::optional<Element> element_of_extension(nb::handle object) {
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  const nb::object name = nb::getattr(dtype, "name", nb::none());
  if (!nb::isinstance<nb::str>(name)) return std::nullopt;
  const std::string_view words = nb::cast<nb::str>(name).c_str();
  if (words == "bfloat16") return Element::bf16;
  if (words == "float8_e4m3fn") return Element::e4m3;
  if (words == "float8_e8m0fnu") return Element::e8m0;
  return std::nullopt;
}

bool is_type_of(nb::handle type, std::string_view module) {
  const nb::object name = nb::getattr(type, "__module__", nb::none());
  if (!nb::isinstance<nb::str>(name)) return false;
  const std::string_view words = nb::cast<nb::str>(name).c_str();
  return words == module || (words.starts_with(module) && words[module.size()] == '.');
}

bool is_from(nb::handle object, std::string_view module) { return is_type_of(object.type(), module); }

template <class Import>
std::optional<Array> import_any(const char* name, nb::handle object) {
  Import import;
  nb::object source = nb::borrow(object);
  std::optional<Element> element;
  if (is_from(object, "numpy") && (element = element_of_extension(object))) {
    source = object.attr("view")(*element == Element::bf16 ? "uint16" : "uint8");
  }
  if (!nb::try_cast(source, import)) return std::nullopt;
  Array out = view_imported(name, import, source);
  if (element) out.element = *element;
  // The import owns a reference to the memory; the array keeps it through a capsule.
  out.owner = nb::capsule(new Import(import), [](void* p) noexcept { delete static_cast<Import*>(p); });
  return out;
}

std::string shape_words(const Array& array) {
  std::string words = "[";
  for (i32 d = 0; d < array.rank; ++d) words += fmt::format("{}{}", d > 0 ? ", " : "", array.shape[d]);
  return words + "]";
}

format::Dtype dtype_of(Element element) {
  switch (element) {
    case Element::f32: return format::Dtype::f32;
    case Element::f16: return format::Dtype::f16;
    case Element::bf16: return format::Dtype::bf16;
    case Element::i32: return format::Dtype::i32;
    case Element::i64: return format::Dtype::i64;
    default: return format::Dtype::u8;
  }
}

void require_element(const Array& array, std::initializer_list<Element> elements) {
  std::string names;
  for (const Element element : elements) {
    if (array.element == element) return;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", weights::element_name(element));
  }
  throw Error(Reason::dtype_unsupported,
              fmt::format("{} is {}, expected {}", array.name, weights::element_name(array.element), names));
}

// A new tensor made by the framework itself.
nb::object allocate(const exchange::Api& api, nb::handle like, const std::vector<i64>& shape, Element element) {
  exchange::Tensor prototype{};
  if (api.borrow(like.ptr(), &prototype) != 0) nb::raise_python_error();
  std::vector<i64> extents = shape;
  const Format format = format_of(element);
  prototype.data = nullptr;
  prototype.dtype = {format.code, format.bits, 1};
  prototype.rank = static_cast<i32>(extents.size());
  prototype.shape = extents.data();
  prototype.strides = nullptr;
  prototype.byte_offset = 0;
  exchange::Managed* made = nullptr;
  const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  if (api.allocate(&prototype, &made, nullptr, fail) != 0) nb::raise_python_error();
  void* object = nullptr;
  if (api.import_managed(made, &object) != 0) nb::raise_python_error();
  return nb::steal(static_cast<PyObject*>(object));
}

}  // namespace

i64 Array::count() const {
  i64 count = 1;
  for (i32 d = 0; d < rank; ++d) count *= shape[d];
  return count;
}

namespace {

// Without a check of its memory.
Array view_any(const char* name, nb::handle object, Access access) {
  if (const exchange::Api* api = api_of(object)) return view_borrowed(name, object, *api);
  const bool writes = access == Access::write;
  std::optional<Array> out;
  if (writes && !is_immutable(object)) out = import_any<nb::ndarray<>>(name, object);
  if (!writes) out = import_any<nb::ndarray<nb::ro>>(name, object);
  if (out) return *out;
  if (writes && import_any<nb::ndarray<nb::ro>>(name, object)) {
    throw Error(Reason::argument_invalid, fmt::format("{} is read-only, expected an array that can be written", name));
  }
  throw Error(
      Reason::argument_invalid,
      fmt::format("{} is {}, expected an array of numpy, torch or another DLPack framework", name, type_words(object)));
}

}  // namespace

Array view(const char* name, nb::handle object, Access access) {
  Array array = view_any(name, object, access);
  if (array.data != nullptr || array.count() == 0) return array;
  throw Error(Reason::argument_invalid,
              fmt::format("{} is {} without memory: freed, or never had", name, shape_words(array)));
}

format::Tensor matrix(const char* name, nb::handle object, i32 device, std::initializer_list<Element> elements,
                      std::vector<nb::object>* owners, Access access) {
  if (object.is_none()) return {};
  const Array array = view(name, object, access);
  if (array.owner.is_valid()) owners->push_back(array.owner);
  require_element(array, elements);
  if (array.device != device) {
    throw Error(Reason::argument_invalid, fmt::format("{} is on {}, expected {}, where the layer is", name,
                                                      device_words(array.device), device_words(device)));
  }
  if (array.rank != 2) {
    throw Error(Reason::argument_invalid, fmt::format("{} is {}, expected 2 dimensions", name, shape_words(array)));
  }
  if (array.strides[1] != 1 && array.shape[1] > 1 && array.shape[0] > 0) {
    throw Error(Reason::stride_unsupported,
                fmt::format("{} has elements of a row {} apart, expected adjacent ones", name, array.strides[1]));
  }
  const i64 stride = array.shape[0] > 1 ? array.strides[0] : array.shape[1];
  return {array.data, dtype_of(array.element), array.shape[0], array.shape[1], stride};
}

namespace {

void hold(const Array& array, nb::handle item, Held* held) {
  (array.device < 0 ? held->host : held->device).push_back(array.owner.is_valid() ? array.owner : nb::borrow(item));
  if (array.device < 0) return;
  const auto known = [&](const nb::object& type) { return type.is(item.type()); };
  if (std::none_of(held->types.begin(), held->types.end(), known)) held->types.push_back(nb::borrow(item.type()));
  if (is_immutable(item)) item.attr("block_until_ready")();  // jax has no current stream
}

}  // namespace

weights::Splits splits(const char* name, nb::handle object, i32 device, Held* held) {
  if (object.is_none()) return {};
  std::vector<weights::Split> list;
  const auto add = [&](nb::handle item) {
    const Array array = view(name, item);
    weights::Split split;
    split.data = array.data;
    split.element = array.element;
    split.shape.assign(array.shape.begin(), array.shape.begin() + array.rank);
    split.strides.assign(array.strides.begin(), array.strides.begin() + array.rank);
    split.device = array.device;
    list.push_back(std::move(split));
    hold(array, item, held);
  };
  if (nb::isinstance<nb::list>(object) || nb::isinstance<nb::tuple>(object)) {
    for (nb::handle item : object) add(item);
  } else {
    add(object);
  }
  return weights::Splits(name, std::move(list), device);
}

namespace {

// Memory of a GPU that any framework can import.
nb::object device_memory(const std::vector<i64>& shape, Element element, i32 device) {
  const gpu::Current current(device);
  throw_unless_ok(current.status());
  const Format format = format_of(element);
  i64 bytes = format.bits / 8;
  for (const i64 extent : shape) bytes *= extent;
  auto buffer = std::make_unique<gpu::Buffer>();
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, std::max<i64>(bytes, 1), "the output", buffer.get()));
  void* data = buffer->data();
  const nb::capsule owner(buffer.release(), [](void* p) noexcept { delete static_cast<gpu::Buffer*>(p); });
  const std::vector<std::size_t> extents(shape.begin(), shape.end());
  return nb::cast(nb::ndarray<nb::array_api>(data, extents.size(), extents.data(), owner, nullptr,
                                             {format.code, format.bits, 1}, nb::device::cuda::value, device));
}

}  // namespace

bool is_immutable(nb::handle like) { return is_from(like, "jax") || is_from(like, "jaxlib"); }

nb::object empty_like(nb::handle like, const std::vector<i64>& shape, Element element, i32 device) {
  if (const exchange::Api* api = api_of(like)) return allocate(*api, like, shape, element);
  if (device >= 0 && is_immutable(like)) return device_memory(shape, element, device);
  const Format format = format_of(element);
  nb::list extents;
  for (const i64 extent : shape) extents.append(extent);
  for (const char* framework : {"torch", "cupy"}) {
    if (!is_from(like, framework)) continue;
    const nb::module_ module = nb::module_::import_(framework);
    if (framework[0] == 'c') return module.attr("empty")(nb::tuple(extents), format.name);
    return module.attr("empty")(nb::tuple(extents), nb::arg("dtype") = module.attr(format.name),
                                nb::arg("device") = like.attr("device"));
  }
  const nb::module_ numpy = nb::module_::import_("numpy");
  nb::object dtype = nb::str(format.name);
  if (element == Element::bf16) dtype = nb::module_::import_("ml_dtypes").attr("bfloat16");
  return numpy.attr("empty")(nb::tuple(extents), dtype);
}

nb::object back_to(nb::handle like, nb::object made, i32 device) {
  if (!is_immutable(like)) return made;
  if (device >= 0) return nb::module_::import_("jax.dlpack").attr("from_dlpack")(made);
  return nb::module_::import_("jax.numpy").attr("asarray")(made);
}

i32 parse_device(const std::string& words) {
  if (words == "cpu") return -1;
  if (words == "cuda") return 0;
  i32 index = -1;
  const char* begin = words.data() + 5;
  const char* end = words.data() + words.size();
  if (words.starts_with("cuda:") && std::from_chars(begin, end, index).ptr == end && index >= 0) return index;
  throw Error(Reason::argument_invalid, fmt::format("device is '{}', expected 'cpu', 'cuda' or 'cuda:N'", words));
}

std::string device_words(i32 device) { return device < 0 ? "cpu" : fmt::format("cuda:{}", device); }

namespace {

// The current stream of the framework that an array type is of.
nb::object current_stream(nb::handle type, i32 device) {
  if (is_type_of(type, "torch")) return nb::module_::import_("torch").attr("cuda").attr("current_stream")(device);
  if (is_type_of(type, "cupy")) return nb::module_::import_("cupy").attr("cuda").attr("get_current_stream")(device);
  return nb::int_(0);
}

}  // namespace

void* stream_of(nb::handle stream, nb::handle type, i32 device) {
  if (device < 0) return nullptr;
  if (stream.is_none()) {
    if (type.is_none()) return nullptr;
    const exchange::Api* api = api_of_type(type);
    if (api == nullptr || api->current_stream == nullptr) return stream_of(current_stream(type, device), type, device);
    void* current = nullptr;
    if (api->current_stream(exchange::kCuda, device, &current) != 0) nb::raise_python_error();
    return current;
  }
  nb::object address = nb::borrow(stream);
  for (const char* attribute : {"cuda_stream", "ptr"}) {
    if (nb::hasattr(stream, attribute)) address = stream.attr(attribute);
  }
  if (nb::hasattr(stream, "__cuda_stream__")) address = stream.attr("__cuda_stream__")()[1];
  if (!nb::isinstance<nb::int_>(address)) {
    throw Error(
        Reason::argument_invalid,
        fmt::format("stream is {}, expected an integer or a stream object of torch or cupy", type_words(stream)));
  }
  return reinterpret_cast<void*>(nb::cast<std::uintptr_t>(address));
}

void wait_for(nb::handle stream, const std::vector<nb::object>& types, i32 device) {
  if (device < 0) return;
  std::vector<void*> streams;
  if (!stream.is_none()) streams.push_back(stream_of(stream, nb::none(), device));
  for (std::size_t i = 0; stream.is_none() && i < types.size(); ++i) {
    streams.push_back(stream_of(stream, types[i], device));
  }
  if (streams.empty()) return;
  const Unlocked unlocked;
  const gpu::Current current(device);
  throw_unless_ok(current.status());
  for (void* one : streams) {
    bool captured = false;
    throw_unless_ok(gpu::capturing(one, &captured));
    if (captured) {
      throw Error(Reason::argument_invalid,
                  "stream is being captured into a graph, expected one that can be waited for: weights are packed "
                  "outside of captures");
    }
    throw_unless_ok(gpu::synchronise(one));
  }
}

}  // namespace fourmoe::python
