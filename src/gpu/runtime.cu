#include <cuda_runtime.h>

#include <string>

#include "gpu/runtime.h"

namespace fourmoe {
namespace {

i32 attribute(cudaDeviceAttr which, i32 device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

}  // namespace

std::vector<Device> probe_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  cudaGetLastError();  // a machine without a driver is no error
  std::vector<Device> found;
  for (int index = 0; index < count; ++index) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, index) != cudaSuccess) continue;
    found.push_back({index, properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                     static_cast<i64>(properties.totalGlobalMem), attribute(cudaDevAttrL2CacheSize, index)});
  }
  return found;
}

namespace gpu {
namespace {

Status to_status(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // errors that pass are not found again by the next launch
  const Reason reason = error == cudaErrorMemoryAllocation ? Reason::out_of_memory : Reason::device_failed;
  return refuse(reason, what + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

std::string sized(const char* what, i64 bytes) { return std::string(what) + ", " + std::to_string(bytes) + " bytes"; }

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

}  // namespace

Current::Current(i32 device) {
  int now = 0;
  status_ = to_status(cudaGetDevice(&now), "current device");
  if (!status_.ok() || now == device) return;
  status_ = to_status(cudaSetDevice(device), "device cuda:" + std::to_string(device));
  if (status_.ok()) before_ = now;
}

Current::~Current() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (kind_ == Kind::device) cudaFree(data_);
  else cudaFreeHost(data_);
}

Status Buffer::make(Kind kind, i64 bytes, const char* what, Buffer* out) {
  Buffer made;
  made.kind_ = kind;
  void* memory = nullptr;
  if (bytes > 0) {
    const cudaError_t error = kind == Kind::device
                                  ? cudaMalloc(&memory, static_cast<std::size_t>(bytes))
                                  : cudaHostAlloc(&memory, static_cast<std::size_t>(bytes), cudaHostAllocMapped);
    if (Status status = to_status(error, sized(what, bytes)); !status.ok()) return status;
  }
  made.data_ = static_cast<std::byte*>(memory);
  made.bytes_ = bytes;
  *out = std::move(made);
  return {};
}

OwnStream::~OwnStream() {
  if (stream_ != nullptr) cudaStreamDestroy(native(stream_));
}

Status OwnStream::make(OwnStream* out) {
  cudaStream_t made = nullptr;
  Status status = to_status(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "making a stream");
  out->stream_ = made;
  return status;
}

Event::~Event() {
  if (event_ != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

Status Event::make(Event* out) {
  cudaEvent_t made = nullptr;
  Status status = to_status(cudaEventCreate(&made), "making an event");
  out->event_ = made;
  return status;
}

Status Event::record(Stream stream) {
  return to_status(cudaEventRecord(static_cast<cudaEvent_t>(event_), native(stream)), "recording an event");
}

Status Event::hold(Stream stream) const {
  return to_status(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(event_), 0), "waiting for an event");
}

Status Event::wait() const {
  return to_status(cudaEventSynchronize(static_cast<cudaEvent_t>(event_)), "waiting for an event");
}

Status Event::seconds(const Event& begin, const Event& end, f64* out) {
  float milliseconds = 0.0f;
  const cudaError_t error =
      cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(begin.event_), static_cast<cudaEvent_t>(end.event_));
  *out = 1e-3 * milliseconds;
  return to_status(error, "time between two events");
}

Graph::~Graph() {
  if (graph_ != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph_));
}

Status Graph::capture(Stream stream, const std::function<Status()>& enqueue, Graph* out) {
  const cudaStreamCaptureMode mode = cudaStreamCaptureModeThreadLocal;
  if (Status status = to_status(cudaStreamBeginCapture(native(stream), mode), "beginning a capture"); !status.ok()) {
    return status;
  }
  Status enqueued = enqueue();
  cudaGraph_t graph = nullptr;
  Status status = to_status(cudaStreamEndCapture(native(stream), &graph), "ending a capture");
  Graph made;
  cudaGraphExec_t executable = nullptr;
  if (enqueued.ok() && status.ok()) {
    status = to_status(cudaGraphInstantiate(&executable, graph, 0), "making a graph");
    made.graph_ = executable;
  }
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (!enqueued.ok()) return enqueued;
  if (status.ok()) *out = std::move(made);
  return status;
}

Status Graph::launch(Stream stream) const {
  return to_status(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph_), native(stream)), "launching a graph");
}

Status copy(void* to, const void* from, i64 bytes, Stream stream, const char* what) {
  if (bytes == 0) return {};
  return to_status(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), cudaMemcpyDefault, native(stream)),
                   "copy of " + sized(what, bytes));
}

Status fill(void* memory, u8 byte, i64 bytes, Stream stream) {
  if (bytes == 0) return {};
  return to_status(cudaMemsetAsync(memory, byte, static_cast<std::size_t>(bytes), native(stream)),
                   sized("filling memory", bytes));
}

Status synchronise(Stream stream) { return to_status(cudaStreamSynchronize(native(stream)), "waiting for a stream"); }

Status synchronise_device() { return to_status(cudaDeviceSynchronize(), "waiting for the device"); }

Status capturing(Stream stream, bool* yes) {
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  Status status = to_status(cudaStreamIsCapturing(native(stream), &state), "asking whether a stream is captured");
  *yes = state != cudaStreamCaptureStatusNone;
  return status;
}

Status locate(const void* address, i32* device) {
  cudaPointerAttributes found{};
  *device = -1;
  if (Status status = to_status(cudaPointerGetAttributes(&found, address), "looking up an address"); !status.ok()) {
    return status;
  }
  if (found.type == cudaMemoryTypeDevice || found.type == cudaMemoryTypeManaged) *device = found.device;
  return {};
}

}  // namespace gpu
}  // namespace fourmoe
