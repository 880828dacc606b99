// The two GEMMs of the Hopper room against sums in double: every tile shape, every activation, odd sizes, biases.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <random>
#include <set>
#include <thread>

#include "backends/sm90/gemm1.h"
#include "backends/sm90/gemm2.h"
#include "backends/sm90/tiles.h"
#include "gemm1/activation.h"
#include "memory.h"
#include "route/route.h"
#include "weights/window.h"

namespace fourmoe::sm90 {
namespace {

using format::Encoding;
using testing::DeviceVector;

struct Size {
  int hidden, inter, experts;
  bool gated;
};

// A matrix with its own memory.
struct Weights {
  std::vector<u8> codes, scales;
  format::Matrix matrix;
};

Weights random_dense(int rows, int cols, std::mt19937_64& random) {
  Weights w;
  w.codes.resize(i64{rows} * cols * 2);
  std::normal_distribution<f32> normal(0.0f, 8.0f);
  for (i64 i = 0; i < i64{rows} * cols; ++i) format::write(w.codes.data(), format::Dtype::bf16, i, normal(random));
  w.matrix = {w.codes.data(), nullptr, 2 * cols, 0, rows, cols, Encoding::bf16, 1.0f};
  return w;
}

// Some scales are zero, or nearly in MXFP4.
Weights random_weights(int rows, int cols, Encoding encoding, std::mt19937_64& random) {
  if (encoding == Encoding::bf16) return random_dense(rows, cols, random);
  Weights w;
  const int block = format::block_of(encoding);
  w.codes.resize(i64{rows} * cols / 2);
  w.scales.resize(i64{rows} * cols / block);
  for (u8& c : w.codes) c = static_cast<u8>(random());
  const bool powers = encoding == Encoding::mxfp4;
  for (u8& s : w.scales) {
    s = static_cast<u8>(powers ? 124 + random() % 6 : 0x20 + random() % 0x28);
    if (random() % 64 == 0) s = powers ? 5 : 0;
  }
  w.matrix = {w.codes.data(), w.scales.data(), cols / 2, cols / block, rows, cols, encoding, 1.0f};
  return w;
}

// What joins a matrix's global when it is packed.
f32 factor_of(const format::Matrix& m) {
  const i32 window = m.encoding == Encoding::mxfp4 ? weights::find_exponents(m).first() : 0;
  return std::ldexp(1.0f, kPacking.exponent(m.encoding, window));
}

std::vector<f32> random_floats(i64 count, f32 deviation, std::mt19937_64& random) {
  std::normal_distribution<f32> normal(0.0f, deviation);
  std::vector<f32> values(count);
  for (f32& v : values) v = normal(random);
  return values;
}

// A layer's weights on both sides.
class Layer {
 public:
  Layer(const Size& size, Encoding encoding, std::mt19937_64& random) : size(size) {
    const int rows1 = size.gated ? 2 * size.inter : size.inter;
    std::vector<const std::byte*> first, second;
    for (int e = 0; e < size.experts; ++e) {
      gate.push_back(random_weights(size.inter, size.hidden, encoding, random));
      up.push_back(random_weights(size.inter, size.hidden, encoding, random));
      down.push_back(random_weights(size.hidden, size.inter, encoding, random));
      std::vector<u8> one(blob_bytes(rows1, size.hidden, encoding)), two(blob_bytes(size.hidden, size.inter, encoding));
      pack(size.gated ? &gate[e].matrix : nullptr, up[e].matrix, one.data());
      pack(nullptr, down[e].matrix, two.data());
      blobs.emplace_back(one);
      first.push_back(reinterpret_cast<const std::byte*>(blobs.back().data()));
      blobs.emplace_back(two);
      second.push_back(reinterpret_cast<const std::byte*>(blobs.back().data()));
      globals1.insert(globals1.end(), {0.004f + 0.0001f * e, 0.003f});
      globals2.push_back(0.005f + 0.0001f * e);
    }
    gate_bias = random_floats(i64{size.experts} * size.inter, 0.5f, random);
    up_bias = random_floats(i64{size.experts} * size.inter, 0.5f, random);
    down_bias = random_floats(i64{size.experts} * size.hidden, 0.5f, random);
    table1 = DeviceVector<const std::byte*>(first);
    table2 = DeviceVector<const std::byte*>(second);
    for (int e = 0; e < size.experts; ++e) {
      packed_globals1.push_back(globals1[2 * e] * factor_of(gate[e].matrix));
      packed_globals1.push_back(globals1[2 * e + 1] * factor_of(up[e].matrix));
      packed_globals2.push_back(globals2[e] * factor_of(down[e].matrix));
    }
  }

  Size size;
  std::vector<Weights> gate, up, down;
  std::vector<f32> globals1, globals2, packed_globals1, packed_globals2, gate_bias, up_bias, down_bias;
  std::vector<DeviceVector<u8>> blobs;
  DeviceVector<const std::byte*> table1, table2;
};

// Rows of bf16, or two planes that sum to rows of f16.
struct Tokens {
  Tokens(int planes, i64 slots, int columns) : columns(columns), plane(slots * columns), bits(planes * plane, 0xffff) {}

  void set(i64 index, f32 value) {
    const bool two = plane < static_cast<i64>(bits.size());
    if (two) value = format::from_f16(format::to_f16_saturated(value));
    bits[index] = format::to_bf16(value);
    if (two) bits[plane + index] = format::to_bf16(value - format::from_bf16(bits[index]));
  }
  f64 at(i64 index) const {
    f64 sum = 0;
    for (i64 i = index; i < static_cast<i64>(bits.size()); i += plane) sum += format::from_bf16(bits[i]);
    return sum;
  }

  int columns;
  i64 plane;
  std::vector<u16> bits;
};

f64 dot(const format::Matrix& m, int row, const Tokens& x, i64 slot) {
  f64 sum = 0;
  for (int k = 0; k < m.cols; ++k) sum += format::weight_at(m, row, k) * x.at(slot * x.columns + k);
  return sum;
}

struct Error {
  f64 difference = 0, norm = 0;
  void add(f64 found, f64 wanted) {
    difference += (found - wanted) * (found - wanted);
    norm += wanted * wanted;
  }
  f64 relative() const { return std::sqrt(difference / std::max(norm, 1e-300)); }
};

constexpr int kEveryWidth = 2 + static_cast<int>(std::size(TileShape{}.sizes));  // experts

// Slots of each expert; one has none. Of kEveryWidth experts each N of the shape has one.
std::vector<i32> random_begins(int experts, const TileShape& shape, std::mt19937_64& random) {
  const int most = 2 * (shape.sizes[0] * 3 / 4 + 1);
  std::vector<i32> begin(1, 0);
  for (int e = 0; e < experts; ++e) {
    int count = e == 1 ? 0 : 1 + static_cast<int>(random() % most);
    if (experts == kEveryWidth && e >= 2 && shape.sizes[e - 2] > 0) {
      count = shape.sizes[e - 2] - static_cast<int>(random() % 8);
    }
    begin.push_back(begin.back() + count);
  }
  return begin;
}

// The same two calls where gemm2 begins before gemm1 has ended: y and z to the bit, y counted to the last value, and
// gemm2 at a standstill as long as one value of one expert is wanting. With few blocks all of gemm2's run beside
// gemm1's, and each has many tiles.
void check_meeting(Gemm1 one, Gemm2 two, const std::vector<i32>& begin, int blocks) {
  SCOPED_TRACE(::testing::Message() << blocks << " blocks");
  const DeviceVector<u16> y(one.max_slots * one.inter);
  const DeviceVector<f32> z(two.max_slots * two.hidden);
  std::vector<u64> stored(route::progress_words(one.experts));
  const DeviceVector<u64> counters(stored);
  const auto same = [](const auto& found, const void* wanted) {
    std::vector<u8> a(found.size() * sizeof(*found.data())), b(a.size());
    testing::require(cudaMemcpy(a.data(), found.data(), a.size(), cudaMemcpyDeviceToHost), "download");
    testing::require(cudaMemcpy(b.data(), wanted, b.size(), cudaMemcpyDeviceToHost), "download");
    return a == b;
  };
  const u16* wanted_y = two.rows;
  const f32* wanted_z = two.z;
  one.y = y.data(), two.rows = y.data(), two.z = z.data();
  one.progress = two.progress = {counters.data(), one.inter};
  ASSERT_TRUE(launch(one, blocks, nullptr).ok());
  ASSERT_TRUE(launch(two, blocks, nullptr).ok());
  testing::require(cudaDeviceSynchronize(), "gemms that meet");
  EXPECT_TRUE(same(y, wanted_y));
  EXPECT_TRUE(same(z, wanted_z));
  for (int e = 0; e < one.experts; ++e) stored[e] = u64(begin[e + 1] - begin[e]) * one.inter;
  const std::vector<u64> counted = counters.download();
  EXPECT_TRUE(std::equal(stored.begin(), stored.end() - 2, counted.begin()));

  int last = one.experts - 1;
  while (begin[last] == begin[last + 1]) --last;
  const u64 all = stored[last]--;
  counters.upload(stored);
  testing::require(cudaMemset(z.data(), 0xff, z.size() * sizeof(f32)), "poison");
  testing::require(cudaDeviceSynchronize(), "poison");
  cudaStream_t streams[2];
  for (cudaStream_t& stream : streams) {
    testing::require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  }
  ASSERT_TRUE(launch(two, blocks, streams[0]).ok());
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  EXPECT_EQ(cudaStreamQuery(streams[0]), cudaErrorNotReady);
  testing::require(cudaMemcpyAsync(counters.data() + last, &all, sizeof all, cudaMemcpyHostToDevice, streams[1]),
                   "all");
  for (cudaStream_t& stream : streams) {
    testing::require(cudaStreamSynchronize(stream), "gemm2");
    testing::require(cudaStreamDestroy(stream), "stream");
  }
  EXPECT_TRUE(same(z, wanted_z));
}

class Gemms : public ::testing::TestWithParam<int> {};

void check(const Size& size, int tile, bool biases, ActivationKind kind, bool powers = false) {
  SCOPED_TRACE(::testing::Message() << "H " << size.hidden << " I " << size.inter << " E " << size.experts
                                    << " activation " << activation_name(kind) << " biases " << biases);
  std::mt19937_64 random(size.hidden + tile);
  const Form form = kTileShapes[tile].form;
  const Encoding encoding = form.dense ? Encoding::bf16 : powers ? Encoding::mxfp4 : Encoding::nvfp4;
  const Layer layer(size, encoding, random);
  const std::vector<i32> begin = random_begins(size.experts, kTileShapes[tile], random);
  const i64 slots = begin.back(), max_slots = slots + 40;
  Tokens x(form.planes, max_slots, size.hidden);
  for (i64 i = 0; i < slots * size.hidden; ++i) x.set(i, random_floats(1, 1.0f, random)[0]);

  const DeviceVector<u16> rows(x.bits);
  const DeviceVector<i32> begins(begin);
  const DeviceVector<f32> globals1(layer.packed_globals1), globals2(layer.packed_globals2), gate_bias(layer.gate_bias),
      up_bias(layer.up_bias), down_bias(layer.down_bias);
  const DeviceVector<u16> y(form.planes * max_slots * size.inter);
  const DeviceVector<f32> wide(max_slots * size.inter), z(max_slots * size.hidden);
  int multiprocessors = 0;
  testing::require(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "multiprocessors");

  Gemm1 one;
  one.blobs = layer.table1.data(), one.globals = globals1.data(), one.expert_begin = begins.data();
  if (biases) one.gate_bias = gate_bias.data(), one.up_bias = up_bias.data();
  one.rows = rows.data(), one.y = y.data();
  one.experts = size.experts, one.hidden = size.hidden, one.inter = size.inter;
  one.max_slots = max_slots, one.activation.kind = kind, one.tile = tile, one.form = form, one.powers = powers;
  Gemm2 two;
  two.blobs = layer.table2.data(), two.globals = globals2.data(), two.expert_begin = begins.data();
  if (biases) two.bias = down_bias.data();
  two.rows = y.data(), two.z = z.data();
  two.experts = size.experts, two.hidden = size.hidden, two.inter = size.inter;
  two.max_slots = max_slots, two.tile = tile, two.form = form, two.powers = powers, two.follows_gemm1 = true;
  ASSERT_TRUE(launch(one, multiprocessors, nullptr).ok());
  ASSERT_TRUE(launch(two, multiprocessors, nullptr).ok());
  if (form.planes == 1) {  // others never meet (tiles.h: progress_of)
    for (const int blocks : {multiprocessors, 5, 1}) check_meeting(one, two, begin, blocks);
  }
  one.y = nullptr, one.y_wide = wide.data();
  ASSERT_TRUE(launch(one, multiprocessors, nullptr).ok());
  testing::require(cudaDeviceSynchronize(), "gemms");

  Tokens y_found(form.planes, max_slots, size.inter);
  y_found.bits = y.download();
  const auto wide_found = wide.download(), z_found = z.download();
  Error narrow_error, wide_error, z_error;
  const int samples = static_cast<int>(std::max<i64>(4, 2000 / std::max<i64>(slots, 1)));
  for (int e = 0; e < size.experts; ++e) {
    for (i64 slot = begin[e]; slot < begin[e + 1]; ++slot) {
      for (int j = 0; j < samples; ++j) {
        const int f = j == 0 ? size.inter - 1 : static_cast<int>(random() % size.inter);
        f64 gate = 0, up = dot(layer.up[e].matrix, f, x, slot) * 0.003f;
        if (size.gated) gate = dot(layer.gate[e].matrix, f, x, slot) * layer.globals1[2 * e];
        if (biases) gate += layer.gate_bias[i64{e} * size.inter + f], up += layer.up_bias[i64{e} * size.inter + f];
        const f64 wanted = gemm1::activate(one.activation, gate, up);
        narrow_error.add(y_found.at(slot * size.inter + f), wanted);
        wide_error.add(wide_found[slot * size.inter + f], wanted);
        const int h = j == 0 ? size.hidden - 1 : static_cast<int>(random() % size.hidden);
        f64 out = dot(layer.down[e].matrix, h, y_found, slot) * layer.globals2[e];
        if (biases) out += layer.down_bias[i64{e} * size.hidden + h];
        z_error.add(z_found[slot * size.hidden + h], out);
      }
    }
  }
  EXPECT_LE(narrow_error.relative(), form.planes == 2 ? 4e-4 : 3e-3);  // gemm1/gemm1.h; f16 has three more bits
  EXPECT_LE(wide_error.relative(), 2e-4);
  EXPECT_LE(z_error.relative(), 2e-4);
  for (int plane = 0; plane < form.planes; ++plane) {
    const auto begin = y_found.bits.begin() + plane * y_found.plane;
    EXPECT_TRUE(std::all_of(begin + slots * size.inter, begin + y_found.plane, [](u16 v) { return v == 0xffff; }));
  }
  EXPECT_TRUE(std::all_of(z_found.begin() + slots * size.hidden, z_found.end(), [](f32 v) { return std::isnan(v); }));
}

TEST_P(Gemms, MatchSumsInDouble) {
  if (!testing::has_hopper()) GTEST_SKIP() << "no Hopper GPU here";
  const int tile = GetParam();
  using enum ActivationKind;
  const ActivationKind kinds[] = {swiglu, swiglu_clamped, geglu_erf, geglu_tanh};
  check({192, 80, 5, true}, tile, true, kinds[tile % 4]);
  check({512, 352, 6, true}, tile, false, kinds[(tile + 1) % 4]);
  check({2688, 1856, 2, false}, tile, tile % 2 == 0, relu2);
  check({2880, 704, 3, true}, tile, true, kinds[(tile + 2) % 4]);
  check({192, 96, kEveryWidth, true}, tile, true, kinds[(tile + 3) % 4]);
  check({192, 64, 70, true}, tile, false, swiglu);  // more experts than a warp has lanes
  if (kTileShapes[tile].form.dense) return;
  check({2880, 96, 3, true}, tile, true, swiglu_clamped, true);
  check({160, 1056, 4, false}, tile, false, relu2, true);
  check({128, 96, kEveryWidth, false}, tile, true, relu2, true);
}

TEST_P(Gemms, SmallMatchSumsInDouble) {  // for the sanitizers
  if (!testing::has_hopper()) GTEST_SKIP() << "no Hopper GPU here";
  check({192, 80, 5, true}, GetParam(), true, ActivationKind::swiglu);
  check({144, 208, 3, false}, GetParam(), true, ActivationKind::relu2);
  if (!kTileShapes[GetParam()].form.dense) check({96, 64, 3, true}, GetParam(), true, ActivationKind::swiglu, true);
}

INSTANTIATE_TEST_SUITE_P(Tiles, Gemms, ::testing::Range(0, kTileShapeCount));

}  // namespace
}  // namespace fourmoe::sm90
