#include "weights/device_packed.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "flow.h"
#include "weights/bad_scale.h"
#include "weights/place.h"
#include "workspace.h"

namespace fourmoe::weights {
namespace {

using format::Matrix;

constexpr i64 kStagingBytes = 16ll << 20;  // a copy this long reaches the bus's full rate
constexpr const char* kNames[] = {"gate", "up", "down"};
const Matrix kNone;

i64 scale_bytes(format::Encoding encoding, i32 cols) {
  return format::is_fp4(encoding) ? cols / format::block_of(encoding) : 0;
}

Rows rows_of(const Matrix& matrix, i64 first, i32 window) {
  if (matrix.empty()) return {};
  const u8* scales = matrix.scales == nullptr ? nullptr : matrix.scale_row(first);
  return {matrix.row(first), scales, matrix.data_stride, matrix.scales_stride, window};
}

void enqueue_scan(const Rows& rows, i32 count, i32 cols, FoundExponents* found, gpu::Stream stream) {
  if constexpr (gpu::kBuilt) throw_unless_ok(find_exponents(rows, count, cols, found, stream));
}

void enqueue_check(const Matrix& matrix, u64* found, gpu::Stream stream) {
  if constexpr (gpu::kBuilt) {
    const Rows rows = rows_of(matrix, 0, 0);
    throw_unless_ok(find_bad_scale(rows, matrix.encoding, matrix.rows, matrix.cols, found, stream));
  }
}

// One result for each of `count` matrices, which begins as bytes `initial` and which the device writes.
template <class T>
class Results {
 public:
  Results(i64 count, u8 initial, const char* what, gpu::Stream stream) : what_(what), stream_(stream), values_(count) {
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, count * sizeof(T), what, &memory_));
    throw_unless_ok(gpu::fill(memory_.data(), initial, memory_.bytes(), stream));
  }
  T* at(i64 index) const { return memory_.as<T>() + index; }
  const std::vector<T>& fetch() {
    throw_unless_ok(gpu::copy(values_.data(), memory_.data(), memory_.bytes(), stream_, what_));
    throw_unless_ok(gpu::synchronise(stream_));
    return values_;
  }

 private:
  const char* what_;
  gpu::Stream stream_;
  gpu::Buffer memory_;
  std::vector<T> values_;
};

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

i64 DevicePacked::staging_bytes() const {
  const i64 gemm1_band = (gated_ ? 2 : 1) * packing_.band_rows(gated_) * row_bytes(hidden_);
  const i64 single_band = packing_.band_rows(false) * row_bytes(std::max(hidden_, inter_));
  return std::max({kStagingBytes, gemm1_band, single_band});
}

f32 DevicePacked::global(const Source& source) const {
  return std::ldexp(source.matrix->global, packing_.exponent(encoding_, source.window));
}

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

void DevicePacked::check(std::span<const Expert> experts) const {
  const auto fits = [&](const Matrix& a, i32 rows, i32 cols) {
    return !a.empty() && a.rows == rows && a.cols == cols && a.encoding == encoding_;
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

// Whether a part of matrix or bias `index` ([experts, 3]) lies in the device's memory, or there is none.
bool DevicePacked::is_here(const void* address, const char* part, i64 index) const {
  if (address == nullptr) return true;
  const i32 place = place_of(address, device_);
  if (place < 0 || place == device_) return place == device_;
  throw Error(Reason::memory_misplaced,
              fmt::format("{}{} of expert {} is in memory of cuda:{}, expected memory of the host or of cuda:{}",
                          kNames[index % 3], part, index / 3, place, device_));
}

DevicePacked::Sources DevicePacked::find(std::span<const Expert> experts) const {
  check(experts);
  Sources sources;
  sources.reserve(3 * experts.size());
  for (const Expert& expert : experts) {
    for (const Matrix* matrix : {&expert.gate, &expert.up, &expert.down}) {
      const i64 index = std::ssize(sources);
      const u8* scales = format::is_fp4(encoding_) ? matrix->scales : nullptr;
      sources.push_back({matrix, is_here(matrix->data, "", index), is_here(scales, "_scale", index)});
    }
  }
  return sources;
}

// Scales in host memory were checked where they came from; those on the device only it can read.
void DevicePacked::check_scales(const Sources& sources, gpu::Stream stream) const {
  const auto mine = [](const Source& s) { return !s.matrix->empty() && s.scales_here; };
  if (!format::is_fp4(encoding_) || std::none_of(sources.begin(), sources.end(), mine)) return;
  Results<u64> results(std::ssize(sources), 0xff, "bad scales", stream);
  for (i64 i = 0; i < std::ssize(sources); ++i) {
    if (mine(sources[i])) enqueue_check(*sources[i].matrix, results.at(i), stream);
  }
  const std::vector<u64>& found = results.fetch();
  const auto first = std::find_if(found.begin(), found.end(), [](u64 f) { return f != kNoBadScale; });
  if (first == found.end()) return;
  const i64 index = first - found.begin();
  const format::BadScale bad = bad_scale_of(*first, scale_bytes(encoding_, sources[index].matrix->cols));
  throw Error(Reason::scale_invalid, fmt::format("{}_scale, expert {}, has 0x{:02x} at [{}, {}]: NaN or negative",
                                                 kNames[index % 3], index / 3, bad.byte, bad.row, bad.block));
}

// Exponents of all matrices: of those in host memory by its threads, of all others by the device.
std::vector<Exponents> DevicePacked::scan(const Sources& sources, Upload* upload, Executor& executor) const {
  Results<FoundExponents> results(std::ssize(sources), 0, "ranges of scales", upload->stream());
  std::vector<i64> on_host;
  for (i64 i = 0; i < std::ssize(sources); ++i) {
    const Matrix& matrix = *sources[i].matrix;
    if (matrix.empty()) continue;
    if (!sources[i].values_here && !sources[i].scales_here) {
      on_host.push_back(i);
      continue;
    }
    for_bands({&kNone}, sources[i], upload, [&](const Rows&, const Rows& rows, i32, i32 count) {
      enqueue_scan(rows, count, matrix.cols, results.at(i), upload->stream());
    });
  }
  const std::vector<FoundExponents>& found = results.fetch();
  std::vector<Exponents> all(sources.size());
  std::transform(found.begin(), found.end(), all.begin(), [](const FoundExponents& f) { return f.get(); });
  executor.parallel_for(std::ssize(on_host),
                        [&](i64 i) { all[on_host[i]] = find_exponents(*sources[on_host[i]].matrix); });
  return all;
}

void DevicePacked::find_windows(Sources* sources, Upload* upload, Executor& executor) const {
  const std::vector<Exponents> all = scan(*sources, upload, executor);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!all[i].fit()) {
      throw Error(Reason::encoding_unsupported,
                  fmt::format("{} of expert {} {}", kNames[i % 3], i / 3, refusal(all[i])));
    }
    (*sources)[i].window = all[i].first();
  }
}

// Bias `index` ([experts, 3]); `to` is in numbers_host_.
void DevicePacked::write_bias(const f32* bias, i64 index, i32 count, f32* to, gpu::Stream stream) const {
  if (!is_here(bias, "_bias", index)) std::copy_n(bias, count, to);
  else throw_unless_ok(gpu::copy(to, bias, i64{count} * sizeof(f32), stream, "biases"));
}

// Everything but the blobs, in the layout of the device.
void DevicePacked::write_numbers(std::span<const Expert> experts, const Sources& sources, gpu::Stream stream) {
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
    host(table_.gemm1_globals)[2 * e] = global(sources[3 * e]) * input;
    host(table_.gemm1_globals)[2 * e + 1] = global(sources[3 * e + 1]) * input;
    host(table_.gemm2_globals)[e] = global(sources[3 * e + 2]) * inter;
    host(table_.input_scale)[e] = expert.input_scale;
    host(table_.inter_scale)[e] = expert.inter_scale;
    const auto write = [&](const f32* bias, i64 index, i32 count, const f32* all) {
      if (bias != nullptr) write_bias(bias, index, count, host(all) + e * count, stream);
    };
    write(expert.gate_bias, 3 * e, inter_, table_.gate_bias);
    write(expert.up_bias, 3 * e + 1, inter_, table_.up_bias);
    write(expert.down_bias, 3 * e + 2, hidden_, table_.down_bias);
  }
  throw_unless_ok(gpu::synchronise(stream));  // biases of the device have come
}

// Hands over both matrices: whole where the device can read them, else as many bands at a time as the staging holds.
void DevicePacked::for_bands(const Source& gate, const Source& up, Upload* upload, const Enqueue& enqueue) const {
  const Matrix& matrix = *up.matrix;
  if (gate.here() && up.here()) {
    return enqueue(rows_of(*gate.matrix, 0, gate.window), rows_of(matrix, 0, up.window), 0, matrix.rows);
  }
  const bool gated = !gate.matrix->empty();
  const i32 band = packing_.band_rows(gated);
  const i64 band_source = (gated ? 2 : 1) * band * row_bytes(matrix.cols);
  const i64 step = std::min<i64>(upload->bytes() / band_source, (matrix.rows + band - 1) / band) * band;
  for (i64 first = 0; first < matrix.rows; first += step) {
    const i32 count = static_cast<i32>(std::min<i64>(step, matrix.rows - first));
    const auto bring = [&](const Source& source) {
      const Matrix& m = *source.matrix;
      Rows rows = rows_of(m, first, source.window);
      if (!source.values_here) {
        rows.values_stride = format::row_bytes(encoding_, m.cols);
        rows.values = upload->add(m.row(first), m.data_stride, rows.values_stride, count);
      }
      if (!source.scales_here) {
        rows.scales_stride = scale_bytes(encoding_, m.cols);
        rows.scales = upload->add(m.scale_row(first), m.scales_stride, rows.scales_stride, count);
      }
      return rows;
    };
    upload->begin();
    const Rows gate_rows = bring(gate);
    const Rows up_rows = bring(up);
    upload->send();
    enqueue(gate_rows, up_rows, static_cast<i32>(first), count);
    upload->end();
  }
}

void DevicePacked::pack(const Source& gate, const Source& up, std::byte* blob, Upload* upload) const {
  const i32 cols = up.matrix->cols;
  const i64 band_bytes = packing_.band_bytes(encoding_, cols);
  const i32 band_rows = packing_.band_rows(!gate.matrix->empty());
  for_bands(gate, up, upload, [&](const Rows& gate_rows, const Rows& up_rows, i32 first, i32 count) {
    const Piece piece = {gate_rows, up_rows, encoding_, count, cols, blob + first / band_rows * band_bytes};
    throw_unless_ok(packing_.pack(piece, upload->stream()));
  });
}

void DevicePacked::refit(std::span<const Expert> experts, Executor& executor) {
  const gpu::Current current(device_);
  throw_unless_ok(current.status());
  Sources sources = find(experts);
  Upload upload(staging_bytes(), executor);
  check_scales(sources, upload.stream());
  if (encoding_ == format::Encoding::mxfp4) find_windows(&sources, &upload, executor);
  write_numbers(experts, sources, upload.stream());
  for (i64 e = 0; e < experts_; ++e) {
    pack(sources[3 * e], sources[3 * e + 1], gemm1_blob(e), &upload);
    pack({&kNone}, sources[3 * e + 2], gemm2_blob(e), &upload);
  }
  throw_unless_ok(gpu::copy(numbers_.data(), numbers_host_.data(), numbers_.bytes(), upload.stream(), "scales"));
  throw_unless_ok(gpu::synchronise(upload.stream()));
}

}  // namespace fourmoe::weights
