// runtime: CUDA's memory, streams and errors for plain C++. Built without CUDA (gpu/none.cc) every function refuses
// with not_built, so that callers need no second path.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>

#include "flow.h"
#include "machine.h"
#include "status.h"

namespace fourmoe::gpu {

#if defined(FOURMOE_CUDA)
inline constexpr bool kBuilt = true;
#else
inline constexpr bool kBuilt = false;
#endif

using Stream = void*;  // cudaStream_t; null is the default stream

// What every step of a GPU asks first: a build with CUDA, a device, and the compute capability that its code is for.
Verdict can(const Machine& machine, i32 major, i32 minor);

// What a build without CUDA says where others launch.
inline Status not_built() { return refuse(Reason::not_built, "this build has no CUDA; FOURMOE_CUDA=ON would pass"); }

// Makes `device` current for the calling thread and restores the one before.
class Current {
 public:
  explicit Current(i32 device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  const Status& status() const { return status_; }

 private:
  [[maybe_unused]] i32 before_ = -1;
  Status status_;
};

enum class Kind : u8 { device, pinned };  // memory of the current device; page-locked host memory, seen by the device

// Owns a piece of memory, aligned to 256 bytes.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  // Replaces what *out held. `what` names the memory in the refusal, with its size.
  static Status make(Kind kind, i64 bytes, const char* what, Buffer* out);

  std::byte* data() const { return data_; }  // null when nothing was made, or 0 bytes
  i64 bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(kind_, other.kind_);
  }
  std::byte* data_ = nullptr;
  i64 bytes_ = 0;
  Kind kind_ = Kind::device;
};

// Owns a stream that does not wait for the default one.
class OwnStream {
 public:
  OwnStream() = default;
  ~OwnStream();
  OwnStream(OwnStream&& other) noexcept { std::swap(stream_, other.stream_); }
  OwnStream& operator=(OwnStream&& other) noexcept {
    std::swap(stream_, other.stream_);
    return *this;
  }
  static Status make(OwnStream* out);
  Stream get() const { return stream_; }

 private:
  Stream stream_ = nullptr;
};

class Event {
 public:
  Event() = default;
  ~Event();
  Event(Event&& other) noexcept { std::swap(event_, other.event_); }
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  static Status make(Event* out);
  Status record(Stream stream);      // the work that the stream holds now
  Status hold(Stream stream) const;  // the stream goes on after it
  Status wait() const;               // the calling thread does
  // Between two recorded and past events, as the device saw them.
  static Status seconds(const Event& begin, const Event& end, f64* out);

 private:
  void* event_ = nullptr;
};

// Owns a captured graph, ready to be launched.
class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(Graph&& other) noexcept { std::swap(graph_, other.graph_); }
  Graph& operator=(Graph&& other) noexcept {
    std::swap(graph_, other.graph_);
    return *this;
  }
  // What `enqueue` puts on the stream, which is not the default one. Its refusal is passed on.
  static Status capture(Stream stream, const std::function<Status()>& enqueue, Graph* out);
  Status launch(Stream stream) const;

 private:
  void* graph_ = nullptr;
};

// In stream order; between host and device in either direction. Pageable host memory makes it wait.
Status copy(void* to, const void* from, i64 bytes, Stream stream, const char* what);
Status fill(void* memory, u8 byte, i64 bytes, Stream stream);
Status synchronise(Stream stream);
Status synchronise_device();                 // all streams of the current one
Status capturing(Stream stream, bool* yes);  // into a graph

// The device whose memory an address is in; -1: the host's or nobody's. Host memory that is page-locked counts as the
// host's.
Status locate(const void* address, i32* device);

}  // namespace fourmoe::gpu
