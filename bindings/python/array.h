// Array: any framework's array as a view, and new arrays of the same framework, through DLPack.
//
// torch and others that offer DLPack's C exchange API are read without a Python call; all others go through nanobind's
// ndarray (`__dlpack__` or the buffer protocol). No framework's header is needed.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <string>
#include <vector>

#include "format/tensor.h"
#include "weights/splits.h"

namespace fourmoe::python {

namespace nb = nanobind;
using weights::Element;

inline constexpr i32 kMostDimensions = 8;

// A view; the Python object that it was made from must outlive it.
struct Array {
  const char* name = "";  // of the argument, for messages; a literal
  u8* data = nullptr;     // may be null only when some extent is 0
  Element element = Element::other;
  i32 rank = 0;
  std::array<i64, kMostDimensions> shape{};
  std::array<i64, kMostDimensions> strides{};  // elements
  i32 device = -1;                             // -1: host memory, else index of a CUDA device
  nb::object owner;                            // keeps an import alive where the exchange API was not used

  i64 count() const;
};

// How an argument may be used.
enum class Access { read, write };

// Throws Error(argument_invalid, dtype_unsupported) naming the argument when the object is no array, has too many
// dimensions, lies on a device that is neither the host nor CUDA, has elements but no memory (a torch tensor whose
// storage was freed, or a fake one), or cannot be written and is to be.
Array view(const char* name, nb::handle object, Access access = Access::read);

// A matrix argument of the layer's call: two dimensions, rows contiguous, one of the element types. An empty Tensor for
// None. `device` is where the layer lives. Appends what keeps the memory alive to *owners, where the object itself may
// not: `__dlpack__` may lend a copy.
format::Tensor matrix(const char* name, nb::handle object, i32 device, std::initializer_list<Element> elements,
                      std::vector<nb::object>* owners, Access access = Access::read);

// What weight arguments are made of, by the place of their memory.
struct Held {
  std::vector<nb::object> host;    // owners of arrays in host memory, which a layer may read as long as it lives
  std::vector<nb::object> device;  // and in a GPU's, which are read only while a layer is packed
  std::vector<nb::object> types;   // of the latter arrays, each once: by the current streams of their frameworks they
                                   // are filled
};

// A weight argument: None, one array or a list of them, in host memory or that of `device`, where the layer lives.
// Appends what keeps the memory alive to *held.
weights::Splits splits(const char* name, nb::handle object, i32 device, Held* held);

// Whether arrays of the framework of `like` cannot be written, as JAX's.
bool is_immutable(nb::handle like);

// A new array of the framework and device of `like`. Where its arrays cannot be written, memory that back_to turns into
// one: numpy's on the host, else our own.
nb::object empty_like(nb::handle like, const std::vector<i64>& shape, Element element, i32 device = -1);

// What empty_like made, as an array of the framework of `like`. On a GPU its contents must be complete where the
// framework's arrays cannot be written.
nb::object back_to(nb::handle like, nb::object made, i32 device = -1);

// "cpu" to -1, "cuda" or "cuda:N" to N; also what str(torch.device) gives. Throws Error(argument_invalid).
i32 parse_device(const std::string& words);
std::string device_words(i32 device);

// The stream of a call: `stream` as an integer, or an object with `cuda_stream`, `ptr` or `__cuda_stream__`; where it
// is None, the calling thread's current stream of the framework whose arrays are of `type` (torch, cupy; none: the
// default stream). Null for the host and for the default stream.
void* stream_of(nb::handle stream, nb::handle type, i32 device);

// Waits for `stream`, or where it is None for the current streams of the frameworks of `types`. Nothing for the host.
// Throws Error(argument_invalid) for a stream that is being captured: it cannot be waited for.
void wait_for(nb::handle stream, const std::vector<nb::object>& types, i32 device);

}  // namespace fourmoe::python
