#include "mirror.h"

#include <optional>

namespace fourmoe::cases {

Mirror::Mirror(const Layer& layer, const LayerCall& host) : device_(layer.plan().machine.device), call_(host) {
  if (device_ < 0) return;
  const gpu::Current current(device_);
  throw_unless_ok(current.status());
  add(&call_.hidden, false);
  add(&call_.hidden_scales, false);
  add(&call_.logits, false);
  add(&call_.ids, false);
  add(&call_.weights, false);
  add(&call_.output, true);
  const i64 picks = 4 * host.hidden.rows * layer.problem().top_k;
  call_.picked_ids = static_cast<i32*>(add(host.picked_ids, picks, true));
  call_.picked_weights = static_cast<f32*>(add(host.picked_weights, picks, true));
  refresh();
}

void* Mirror::add(void* host, i64 bytes, bool result) {
  if (host == nullptr || bytes == 0) return nullptr;
  Part part = {host, bytes, result, {}};
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, "a call's tensor", &part.device));
  parts_.push_back(std::move(part));
  return parts_.back().device.data();
}

void Mirror::add(format::Tensor* tensor, bool result) {
  if (tensor->empty()) return;
  const i64 elements = tensor->rows == 0 ? 0 : (tensor->rows - 1) * tensor->stride + tensor->cols;
  tensor->data = add(tensor->data, elements * format::dtype_bytes(tensor->dtype), result);
}

void Mirror::refresh() {
  if (device_ < 0) return;
  const gpu::Current current(device_);
  for (const Part& part : parts_) {
    throw_unless_ok(gpu::copy(part.device.data(), part.host, part.bytes, nullptr, "a call's tensor"));
  }
  throw_unless_ok(gpu::synchronise(nullptr));
}

void Mirror::fetch() {
  if (device_ < 0) return;
  const gpu::Current current(device_);
  throw_unless_ok(gpu::synchronise(call_.stream));
  for (const Part& part : parts_) {
    if (part.result) throw_unless_ok(gpu::copy(part.host, part.device.data(), part.bytes, nullptr, "a result"));
  }
  throw_unless_ok(gpu::synchronise(nullptr));
}

Status run_mirrored(Layer* layer, const LayerCall& host, Workspace workspace) {
  Mirror mirror(*layer, host);
  Status status = layer->run(mirror.call(), workspace);
  if (status.ok()) status = layer->wait(mirror.call().stream);
  if (status.ok()) mirror.fetch();
  return status;
}

}  // namespace fourmoe::cases
