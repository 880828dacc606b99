// DLPack 1.3's C exchange API: the structures by which a framework lends its tensors and its current stream.
// Layouts follow the specification (dmlc/dlpack, dlpack.h); names are ours.
#pragma once

#include <cstdint>

namespace fourmoe::python::exchange {

inline constexpr const char* kCapsule = "dlpack_exchange_api";  // name of the capsule `__dlpack_c_exchange_api__`

enum : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t rank;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // elements; null in old producers: contiguous
  std::uint64_t byte_offset;
};

struct Managed {
  Version version;
  void* context;
  void (*deleter)(Managed*);
  std::uint64_t flags;
  Tensor tensor;
};

struct Header {
  Version version;
  Header* previous;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

// Functions return 0, or -1 with a Python error set (allocate: with SetError called).
struct Api {
  Header header;
  int (*allocate)(Tensor* prototype, Managed** out, void* context, SetError);
  int (*export_managed)(void* object, Managed** out);
  int (*import_managed)(Managed* tensor, void** out_object);  // steals the tensor
  int (*borrow)(void* object, Tensor* out);                   // may be null; shape and strides belong to the object
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** out);
};

}  // namespace fourmoe::python::exchange
