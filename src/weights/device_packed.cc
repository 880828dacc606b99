#include "weights/device_packed.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "flow.h"
#include "workspace.h"

namespace fourmoe::weights {
namespace {

using format::Matrix;

constexpr i64 kStagingBytes = 16ll << 20;  // a copy this long reaches the bus's full rate
constexpr i64 kCopyRows = 64;              // rows that one task copies

bool same_shape(const Matrix& a, i32 rows, i32 cols) {
  return a.rows == rows && a.cols == cols && a.encoding == format::Encoding::nvfp4;
}

i64 row_bytes(i32 cols) { return i64{cols} / 2 + cols / format::kNvfp4Block; }

Rows rows_from(const Matrix& matrix) { return {matrix.data, matrix.scales, matrix.data_stride, matrix.scales_stride}; }

bool on_device(const Matrix& matrix, i32 device) {
  if (matrix.empty()) return true;
  i32 codes = -1;
  i32 scales = -1;
  throw_unless_ok(gpu::locate(matrix.data, &codes));
  throw_unless_ok(gpu::locate(matrix.scales, &scales));
  return codes == device && scales == device;
}

}  // namespace

i64 blob_bytes(const Packing& packing, i32 rows, i32 cols, bool gated) {
  const i32 band = packing.band_rows(gated);
  return (rows + band - 1) / band * packing.band_bytes(cols);
}

// Brings rows from host memory to the device through two pieces of page-locked memory, in turn.
class DevicePacked::Upload {
 public:
  Upload(i64 bytes, Executor& executor) : executor_(executor), bytes_(bytes) {
    throw_unless_ok(gpu::OwnStream::make(&stream_));
    for (Slot& slot : slots_) {
      throw_unless_ok(gpu::Buffer::make(gpu::Kind::pinned, bytes, "staging for weights", &slot.host));
      throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, "staging for weights", &slot.device));
      throw_unless_ok(gpu::Event::make(&slot.done));
    }
  }

  gpu::Stream stream() const { return stream_.get(); }
  i64 bytes() const { return bytes_; }  // of a slot

  // The next slot, once its last piece is packed.
  void begin() {
    turn_ ^= 1;
    throw_unless_ok(slots_[turn_].done.wait());
    used_ = 0;
  }

  // Rows [first, first + count) of a matrix, close together; empty for an empty matrix.
  Rows add(const Matrix& matrix, i64 first, i32 count) {
    if (matrix.empty()) return {};
    const i64 codes_bytes = matrix.cols / 2;
    const i64 scales_bytes = matrix.cols / format::kNvfp4Block;
    std::byte* codes = slots_[turn_].host.data() + used_;
    std::byte* scales = codes + count * codes_bytes;
    executor_.parallel_for((count + kCopyRows - 1) / kCopyRows, [&](i64 task) {
      for (i64 row = task * kCopyRows; row < std::min<i64>(count, (task + 1) * kCopyRows); ++row) {
        std::memcpy(codes + row * codes_bytes, matrix.row(first + row), codes_bytes);
        std::memcpy(scales + row * scales_bytes, matrix.scale_row(first + row), scales_bytes);
      }
    });
    const u8* at = reinterpret_cast<const u8*>(slots_[turn_].device.data() + used_);
    used_ += count * (codes_bytes + scales_bytes);
    return {at, at + count * codes_bytes, codes_bytes, scales_bytes};
  }

  void send() {
    const Slot& slot = slots_[turn_];
    throw_unless_ok(gpu::copy(slot.device.data(), slot.host.data(), used_, stream(), "weights"));
  }
  void end() { throw_unless_ok(slots_[turn_].done.record(stream())); }

 private:
  struct Slot {
    gpu::Buffer host;
    gpu::Buffer device;
    gpu::Event done;
  };
  Executor& executor_;
  i64 bytes_;
  gpu::OwnStream stream_;
  Slot slots_[2];
  int turn_ = 0;
  i64 used_ = 0;
};

DevicePacked::DevicePacked(const Problem& problem, std::span<const Expert> experts, const Packing& packing, i32 device,
                           Executor& executor)
    : packing_(packing),
      device_(device),
      experts_(static_cast<i32>(experts.size())),
      hidden_(problem.hidden),
      inter_(problem.inter),
      gated_(problem.activation.gated()),
      quantised_(problem.precision == Precision::w4a4),
      biases_{} {
  for (const Expert& expert : experts) {
    biases_[0] |= expert.gate_bias != nullptr;
    biases_[1] |= expert.up_bias != nullptr;
    biases_[2] |= expert.down_bias != nullptr;
  }
  const gpu::Current current(device);
  throw_unless_ok(current.status());
  lay_out();
  refit(experts, executor);
}

std::byte* DevicePacked::gemm1_blob(i64 expert) const {
  return blobs_.data() + expert * blob_bytes(packing_, inter_, hidden_, gated_);
}

std::byte* DevicePacked::gemm2_blob(i64 expert) const {
  return gemm1_blob(experts_) + expert * blob_bytes(packing_, hidden_, inter_, false);
}

// Takes the memory and fixes every address.
void DevicePacked::lay_out() {
  const i64 expert = blob_bytes(packing_, inter_, hidden_, gated_) + blob_bytes(packing_, hidden_, inter_, false);
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, experts_ * expert, "packed weights", &blobs_));
  const auto carve = [&](std::byte* base) {
    Carver carver(base);
    table_.gemm1 = carver.take<const std::byte*>(experts_);
    table_.gemm2 = carver.take<const std::byte*>(experts_);
    table_.gemm1_globals = carver.take<f32>(2 * i64{experts_});
    table_.gemm2_globals = carver.take<f32>(experts_);
    table_.input_scale = carver.take<f32>(experts_);
    table_.inter_scale = carver.take<f32>(experts_);
    if (biases_[0]) table_.gate_bias = carver.take<f32>(i64{experts_} * inter_);
    if (biases_[1]) table_.up_bias = carver.take<f32>(i64{experts_} * inter_);
    if (biases_[2]) table_.down_bias = carver.take<f32>(i64{experts_} * hidden_);
    return carver.used();
  };
  const i64 bytes = carve(nullptr);
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes, "scales and biases", &numbers_));
  carve(numbers_.data());
  numbers_host_.resize(static_cast<std::size_t>(bytes));
}

// Everything but the blobs, in the layout of the device.
void DevicePacked::write_numbers(std::span<const Expert> experts) {
  std::fill(numbers_host_.begin(), numbers_host_.end(), std::byte{});
  const auto host = [&]<class T>(T* at) {
    return reinterpret_cast<std::remove_const_t<T>*>(numbers_host_.data() +
                                                     (reinterpret_cast<const std::byte*>(at) - numbers_.data()));
  };
  for (i64 e = 0; e < experts_; ++e) {
    const Expert& expert = experts[e];
    const f32 input = quantised_ ? expert.input_scale : 1.0f;
    const f32 inter = quantised_ ? expert.inter_scale : 1.0f;
    host(table_.gemm1)[e] = gemm1_blob(e);
    host(table_.gemm2)[e] = gemm2_blob(e);
    host(table_.gemm1_globals)[2 * e] = expert.gate.global * input;
    host(table_.gemm1_globals)[2 * e + 1] = expert.up.global * input;
    host(table_.gemm2_globals)[e] = expert.down.global * inter;
    host(table_.input_scale)[e] = expert.input_scale;
    host(table_.inter_scale)[e] = expert.inter_scale;
    if (expert.gate_bias != nullptr) std::copy_n(expert.gate_bias, inter_, host(table_.gate_bias) + e * inter_);
    if (expert.up_bias != nullptr) std::copy_n(expert.up_bias, inter_, host(table_.up_bias) + e * inter_);
    if (expert.down_bias != nullptr) std::copy_n(expert.down_bias, hidden_, host(table_.down_bias) + e * hidden_);
  }
}

void DevicePacked::refit(std::span<const Expert> experts, Executor& executor) {
  for (const Expert& expert : experts) {
    const bool same = same_shape(expert.up, inter_, hidden_) && same_shape(expert.down, hidden_, inter_) &&
                      (gated_ ? same_shape(expert.gate, inter_, hidden_) : expert.gate.empty()) &&
                      (expert.gate_bias == nullptr || biases_[0]) && (expert.up_bias == nullptr || biases_[1]) &&
                      (expert.down_bias == nullptr || biases_[2]);
    if (same && static_cast<i32>(experts.size()) == experts_) continue;
    throw Error(
        Reason::tensor_mismatch,
        fmt::format("expert {} of {} has another shape, encoding or bias than the layer's {} experts, which are "
                    "nvfp4 of hidden {} and intermediate {}",
                    &expert - experts.data(), experts.size(), experts_, hidden_, inter_));
  }
  const gpu::Current current(device_);
  throw_unless_ok(current.status());
  write_numbers(experts);
  pack(experts, executor);
}

// One projection: whole where the device can read it, else as many bands at a time as the staging holds.
void DevicePacked::pack(const Matrix& gate, const Matrix& up, std::byte* blob, Upload* upload) const {
  if (on_device(gate, device_) && on_device(up, device_)) {
    const Piece whole = {rows_from(gate), rows_from(up), up.rows, up.cols, blob};
    return throw_unless_ok(packing_.pack(whole, upload->stream()));
  }
  const i32 band = packing_.band_rows(!gate.empty());
  const i64 band_source = (gate.empty() ? 1 : 2) * band * row_bytes(up.cols);
  const i64 step = std::min<i64>(upload->bytes() / band_source, (up.rows + band - 1) / band) * band;
  for (i64 first = 0; first < up.rows; first += step) {
    Piece piece;
    piece.rows = static_cast<i32>(std::min<i64>(step, up.rows - first));
    piece.cols = up.cols;
    piece.out = blob + first / band * packing_.band_bytes(up.cols);
    upload->begin();
    piece.gate = upload->add(gate, first, piece.rows);
    piece.up = upload->add(up, first, piece.rows);
    upload->send();
    throw_unless_ok(packing_.pack(piece, upload->stream()));
    upload->end();
  }
}

void DevicePacked::pack(std::span<const Expert> experts, Executor& executor) {
  const i64 gemm1_band = (gated_ ? 2 : 1) * packing_.band_rows(gated_) * row_bytes(hidden_);
  const i64 gemm2_band = packing_.band_rows(false) * row_bytes(inter_);
  Upload upload(std::max({kStagingBytes, gemm1_band, gemm2_band}), executor);
  throw_unless_ok(gpu::copy(numbers_.data(), numbers_host_.data(), numbers_.bytes(), upload.stream(), "scales"));
  for (i64 e = 0; e < experts_; ++e) {
    pack(experts[e].gate, experts[e].up, gemm1_blob(e), &upload);
    pack({}, experts[e].down, gemm2_blob(e), &upload);
  }
  throw_unless_ok(gpu::synchronise(upload.stream()));
}

}  // namespace fourmoe::weights
