// Stands in for runtime.cu in a build without CUDA.
#include "gpu/runtime.h"

namespace fourmoe {

std::vector<Device> probe_devices() { return {}; }

namespace gpu {

Current::Current(i32) : status_(not_built()) {}
Current::~Current() = default;
Buffer::~Buffer() = default;
Status Buffer::make(Kind, i64, const char*, Buffer*) { return not_built(); }
OwnStream::~OwnStream() = default;
Status OwnStream::make(OwnStream*) { return not_built(); }
Event::~Event() = default;
Status Event::make(Event*) { return not_built(); }
Status Event::record(Stream) { return not_built(); }
Status Event::hold(Stream) const { return not_built(); }
Status Event::wait() const { return not_built(); }
Status Event::seconds(const Event&, const Event&, f64*) { return not_built(); }
Graph::~Graph() = default;
Status Graph::capture(Stream, const std::function<Status()>&, Graph*) { return not_built(); }
Status Graph::launch(Stream) const { return not_built(); }
Status copy(void*, const void*, i64, Stream, const char*) { return not_built(); }
Status fill(void*, u8, i64, Stream) { return not_built(); }
Status synchronise(Stream) { return not_built(); }
Status synchronise_device() { return not_built(); }
Status capturing(Stream, bool*) { return not_built(); }
Status locate(const void*, i32*) { return not_built(); }

}  // namespace gpu
}  // namespace fourmoe
