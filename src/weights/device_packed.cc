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

Rows rows_from(const Matrix& matrix, i32 window) {
  return {matrix.data, matrix.scales, matrix.data_stride, matrix.scales_stride, window};
}

i64 scale_bytes(format::Encoding encoding, i32 cols) {
  return format::is_fp4(encoding) ? cols / format::block_of(encoding) : 0;
}

bool on_device(const Matrix& matrix, i32 device) {
  if (matrix.empty()) return true;
  i32 values = -1;
  i32 scales = device;
  throw_unless_ok(gpu::locate(matrix.data, &values));
  if (matrix.scales != nullptr) throw_unless_ok(gpu::locate(matrix.scales, &scales));
  return values == device && scales == device;
}

void scan_on_device(const Rows& rows, i32 count, i32 cols, FoundExponents* found) {
  if constexpr (gpu::kBuilt) throw_unless_ok(find_exponents(rows, count, cols, found, nullptr));
}

}  // namespace

DeviceTable entries_from(const DeviceTable& table, const Problem& problem) {
  const i64 experts = problem.local_experts;
  const auto skip = [](auto* first, i64 count) { return first == nullptr ? nullptr : first + count; };
  return {skip(table.gemm1, experts),
          skip(table.gemm2, experts),
          skip(table.gemm1_globals, 2 * experts),
          skip(table.gemm2_globals, experts),
          skip(table.gate_bias, experts * problem.inter),
          skip(table.up_bias, experts * problem.inter),
          skip(table.down_bias, experts * problem.hidden),
          skip(table.input_scale, experts),
          skip(table.inter_scale, experts)};
}

i64 DevicePacked::blob_bytes(i32 rows, i32 cols, bool gated) const {
  const i32 band = packing_.band_rows(gated);
  return (rows + band - 1) / band * packing_.band_bytes(encoding_, cols);
}

i64 DevicePacked::row_bytes(i32 cols) const {
  return format::row_bytes(encoding_, cols) + scale_bytes(encoding_, cols);
}

f32 DevicePacked::global(const Source& source) const {
  return std::ldexp(source.matrix.global, packing_.exponent(encoding_, source.window));
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
  Rows add(const Source& source, i64 first, i32 count) {
    const Matrix& matrix = source.matrix;
    if (matrix.empty()) return {};
    const i64 values_bytes = format::row_bytes(matrix.encoding, matrix.cols);
    const i64 scales_bytes = scale_bytes(matrix.encoding, matrix.cols);
    std::byte* values = slots_[turn_].host.data() + used_;
    std::byte* scales = values + count * values_bytes;
    executor_.parallel_for((count + kCopyRows - 1) / kCopyRows, [&](i64 task) {
      for (i64 row = task * kCopyRows; row < std::min<i64>(count, (task + 1) * kCopyRows); ++row) {
        std::memcpy(values + row * values_bytes, matrix.row(first + row), values_bytes);
        if (scales_bytes == 0) continue;
        std::memcpy(scales + row * scales_bytes, matrix.scale_row(first + row), scales_bytes);
      }
    });
    const u8* at = reinterpret_cast<const u8*>(slots_[turn_].device.data() + used_);
    used_ += count * (values_bytes + scales_bytes);
    return {at, at + count * values_bytes, values_bytes, scales_bytes, source.window};
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
      encoding_(problem.encoding),
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
  return blobs_.data() + expert * blob_bytes(inter_, hidden_, gated_);
}

std::byte* DevicePacked::gemm2_blob(i64 expert) const {
  return gemm1_blob(experts_) + expert * blob_bytes(hidden_, inter_, false);
}

// Takes the memory and fixes every address.
void DevicePacked::lay_out() {
  const i64 expert = blob_bytes(inter_, hidden_, gated_) + blob_bytes(hidden_, inter_, false);
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
    host(table_.gemm1_globals)[2 * e] = global({expert.gate, window(e, kGate)}) * input;
    host(table_.gemm1_globals)[2 * e + 1] = global({expert.up, window(e, kUp)}) * input;
    host(table_.gemm2_globals)[e] = global({expert.down, window(e, kDown)}) * inter;
    host(table_.input_scale)[e] = expert.input_scale;
    host(table_.inter_scale)[e] = expert.inter_scale;
    if (expert.gate_bias != nullptr) std::copy_n(expert.gate_bias, inter_, host(table_.gate_bias) + e * inter_);
    if (expert.up_bias != nullptr) std::copy_n(expert.up_bias, inter_, host(table_.up_bias) + e * inter_);
    if (expert.down_bias != nullptr) std::copy_n(expert.down_bias, hidden_, host(table_.down_bias) + e * hidden_);
  }
}

void DevicePacked::check(std::span<const Expert> experts) const {
  const auto fits = [&](const Matrix& a, i32 rows, i32 cols) {
    return a.rows == rows && a.cols == cols && a.encoding == encoding_;
  };
  for (const Expert& expert : experts) {
    const bool same = fits(expert.up, inter_, hidden_) && fits(expert.down, hidden_, inter_) &&
                      (gated_ ? fits(expert.gate, inter_, hidden_) : expert.gate.empty()) &&
                      (expert.gate_bias == nullptr || biases_[0]) && (expert.up_bias == nullptr || biases_[1]) &&
                      (expert.down_bias == nullptr || biases_[2]);
    if (same && static_cast<i32>(experts.size()) == experts_) continue;
    throw Error(Reason::tensor_mismatch,
                fmt::format("expert {} of {} has another shape, encoding or bias than the layer's {} experts, which "
                            "are {} of hidden {} and intermediate {}",
                            &expert - experts.data(), experts.size(), experts_, format::encoding_name(encoding_),
                            hidden_, inter_));
  }
}

void DevicePacked::refit(std::span<const Expert> experts, Executor& executor) {
  check(experts);
  const gpu::Current current(device_);
  throw_unless_ok(current.status());
  if (encoding_ == format::Encoding::mxfp4) find_windows(experts, executor);
  write_numbers(experts);
  pack(experts, executor);
}

// Exponents of all matrices, three an expert: those in the device's memory by the device, others by the host's threads.
std::vector<Exponents> DevicePacked::scan(std::span<const Expert> experts, Executor& executor) const {
  const i64 count = 3 * static_cast<i64>(experts.size());
  const auto matrix = [&](i64 index) -> const Matrix& {
    const Expert& expert = experts[index / 3];
    return index % 3 == kGate ? expert.gate : index % 3 == kUp ? expert.up : expert.down;
  };
  gpu::Buffer memory;
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, count * sizeof(FoundExponents), "ranges of scales", &memory));
  throw_unless_ok(gpu::fill(memory.data(), 0, memory.bytes(), nullptr));
  std::vector<i64> on_host;
  for (i64 i = 0; i < count; ++i) {
    const Matrix& m = matrix(i);
    if (!on_device(m, device_)) on_host.push_back(i);
    else if (!m.empty()) scan_on_device(rows_from(m, 0), m.rows, m.cols, memory.as<FoundExponents>() + i);
  }
  std::vector<FoundExponents> found(count);
  throw_unless_ok(gpu::copy(found.data(), memory.data(), memory.bytes(), nullptr, "ranges of scales"));
  throw_unless_ok(gpu::synchronise(nullptr));
  std::vector<Exponents> all(count);
  std::transform(found.begin(), found.end(), all.begin(), [](const FoundExponents& f) { return f.get(); });
  executor.parallel_for(static_cast<i64>(on_host.size()),
                        [&](i64 i) { all[on_host[i]] = find_exponents(matrix(on_host[i])); });
  return all;
}

void DevicePacked::find_windows(std::span<const Expert> experts, Executor& executor) {
  static constexpr const char* kNames[] = {"gate", "up", "down"};
  const std::vector<Exponents> all = scan(experts, executor);
  std::vector<i32> windows(all.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!all[i].fit()) {
      throw Error(Reason::encoding_unsupported,
                  fmt::format("{} of expert {} {}", kNames[i % 3], i / 3, refusal(all[i])));
    }
    windows[i] = all[i].first();
  }
  windows_ = std::move(windows);
}

// One projection: whole where the device can read it, else as many bands at a time as the staging holds.
void DevicePacked::pack(const Source& gate, const Source& up, std::byte* blob, Upload* upload) const {
  const Matrix& matrix = up.matrix;
  if (on_device(gate.matrix, device_) && on_device(matrix, device_)) {
    const Piece whole = {
        rows_from(gate.matrix, gate.window), rows_from(matrix, up.window), encoding_, matrix.rows, matrix.cols, blob};
    return throw_unless_ok(packing_.pack(whole, upload->stream()));
  }
  const bool gated = !gate.matrix.empty();
  const i32 band = packing_.band_rows(gated);
  const i64 band_source = (gated ? 2 : 1) * band * row_bytes(matrix.cols);
  const i64 step = std::min<i64>(upload->bytes() / band_source, (matrix.rows + band - 1) / band) * band;
  for (i64 first = 0; first < matrix.rows; first += step) {
    Piece piece;
    piece.encoding = encoding_;
    piece.rows = static_cast<i32>(std::min<i64>(step, matrix.rows - first));
    piece.cols = matrix.cols;
    piece.out = blob + first / band * packing_.band_bytes(encoding_, matrix.cols);
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
    const Expert& expert = experts[e];
    pack({expert.gate, window(e, kGate)}, {expert.up, window(e, kUp)}, gemm1_blob(e), &upload);
    pack({Matrix{}, 0}, {expert.down, window(e, kDown)}, gemm2_blob(e), &upload);
  }
  throw_unless_ok(gpu::synchronise(upload.stream()));
}

}  // namespace fourmoe::weights
