// Packing on the device: bit for bit what the host packs, from host memory in pieces and from the device's own.
#include <fmt/format.h>

#include <cstring>
#include <optional>
#include <span>
#include <tuple>

#include "backends/sm90/tiles.h"
#include "case.h"
#include "gpu/hopper.h"
#include "gpu/moved.h"
#include "weights/device_packed.h"

namespace fourmoe::weights {
namespace {

using cases::move_to_device;
using cases::Moved;
using cases::Which;
using format::Encoding;

struct Shape {
  i32 hidden;
  i32 inter;
  ActivationKind activation;
  Encoding encoding = Encoding::nvfp4;
};

// Odd sizes; and one projection larger than a piece of staging.
constexpr Shape kShapes[] = {{16, 16, ActivationKind::swiglu},
                             {64, 80, ActivationKind::swiglu},
                             {2688, 1856, ActivationKind::relu2},
                             {2880, 352, ActivationKind::geglu_erf},
                             {7168, 2048, ActivationKind::swiglu},
                             {16, 704, ActivationKind::relu2},
                             {32, 96, ActivationKind::swiglu, Encoding::mxfp4},
                             {2880, 2880, ActivationKind::swiglu_clamped, Encoding::mxfp4},
                             {96, 1056, ActivationKind::relu2, Encoding::mxfp4},
                             {80, 176, ActivationKind::swiglu, Encoding::bf16},
                             {2048, 1408, ActivationKind::relu2, Encoding::bf16}};

std::vector<u8> fetch(const std::byte* device, i64 bytes) {
  std::vector<u8> host(static_cast<std::size_t>(bytes), 0xee);
  throw_unless_ok(gpu::copy(host.data(), device, bytes, nullptr, "a blob"));
  throw_unless_ok(gpu::synchronise(nullptr));
  return host;
}

// Address and bytes of the table's blobs, gemm1 of all experts and then gemm2.
std::vector<std::span<const std::byte>> places(const Problem& p, const DeviceTable& table, i32 experts) {
  const i32 rows = p.activation.gated() ? 2 * p.inter : p.inter;
  std::vector<const std::byte*> at(static_cast<std::size_t>(experts));
  std::vector<std::span<const std::byte>> all;
  for (const auto& [addresses, r, c] : {std::tuple{table.gemm1, rows, p.hidden}, {table.gemm2, p.hidden, p.inter}}) {
    const std::vector<u8> bytes = fetch(reinterpret_cast<const std::byte*>(addresses), 8 * experts);
    std::memcpy(at.data(), bytes.data(), bytes.size());
    for (const std::byte* blob : at) all.emplace_back(blob, sm90::blob_bytes(r, c, p.encoding));
  }
  return all;
}

std::vector<std::vector<u8>> blobs(const Problem& p, const DeviceTable& table, i32 experts) {
  std::vector<std::vector<u8>> all;
  for (const auto& blob : places(p, table, experts)) all.push_back(fetch(blob.data(), std::ssize(blob)));
  return all;
}

std::vector<std::vector<u8>> packed_on_host(const Problem& p, const std::vector<Expert>& experts) {
  const bool gated = p.activation.gated();
  std::vector<std::vector<u8>> all;
  for (const Expert& e : experts) {
    all.emplace_back(sm90::blob_bytes(gated ? 2 * p.inter : p.inter, p.hidden, p.encoding));
    sm90::pack(gated ? &e.gate : nullptr, e.up, all.back().data());
  }
  for (const Expert& e : experts) {
    all.emplace_back(sm90::blob_bytes(p.hidden, p.inter, p.encoding));
    sm90::pack(nullptr, e.down, all.back().data());
  }
  return all;
}

// NVFP4: scale bytes of 0 too, whose codes must vanish, and of every subnormal. MXFP4: a window's worth, and scales far
// from it over codes of zero.
void spread_scales(std::vector<Expert>* experts) {
  for (Expert& e : *experts) {
    for (const format::Matrix* m : {&e.gate, &e.up, &e.down}) {
      if (m->encoding == Encoding::bf16) continue;
      u8* scales = const_cast<u8*>(m->scales);
      for (i64 i = 0; i < (m->empty() ? 0 : i64{m->rows} * m->scales_stride); i += 3) {
        scales[i] = m->encoding == Encoding::nvfp4 ? (i / 3) % 127 : static_cast<u8>(60 + (i / 3) % kWindow);
      }
      if (m->encoding != Encoding::mxfp4 || m->empty()) continue;
      scales[0] = 7;
      std::fill_n(const_cast<u8*>(m->data), 16, u8{0x80});
    }
  }
}

std::vector<f32> fetch_floats(const f32* device, i64 count) {
  std::vector<f32> values(static_cast<std::size_t>(count));
  const std::vector<u8> bytes = fetch(reinterpret_cast<const std::byte*>(device), 4 * count);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

class Packing : public testing::TestWithParam<Shape> {};

TEST_P(Packing, EqualsTheHostsBitForBit) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(GetParam().hidden, GetParam().inter, 3, 1);
  p.activation.kind = GetParam().activation;
  p.encoding = GetParam().encoding;
  checkpoint::Layer layer = cases::random_layer(p, 5, false);
  spread_scales(&layer.experts);
  const DevicePacked packed(p, layer.experts, sm90::kPacking, 0, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 3), packed_on_host(p, layer.experts));
}

TEST_P(Packing, RefitsInPlaceFromTheDevicesOwnMemory) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(GetParam().hidden, GetParam().inter, 2, 1);
  p.activation.kind = GetParam().activation;
  p.encoding = GetParam().encoding;
  DevicePacked packed(p, cases::random_layer(p, 5, false).experts, sm90::kPacking, 0, tbb_executor());
  const auto addresses = fetch(reinterpret_cast<const std::byte*>(packed.table().gemm1), 16);

  checkpoint::Layer other = cases::random_layer(p, 6, false);
  spread_scales(&other.experts);
  const Moved moved = move_to_device(other.experts);
  packed.refit(moved.experts, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 2), packed_on_host(p, other.experts));
  EXPECT_EQ(fetch(reinterpret_cast<const std::byte*>(packed.table().gemm1), 16), addresses);
}

// Bits of the parts (gpu/moved.h) that lie on the device, an expert each: values alone, scales alone, gate and a part
// of down, ...
constexpr u32 kMixes[] = {0b010101, 0b101010, 0b010011, 0b001100, 0b110000, 0b100110, 0b111111, 0};

TEST_P(Packing, EachPartIsReadWhereItLies) {
  FOURMOE_NEEDS_HOPPER();
  const bool large = GetParam().hidden * GetParam().inter > 1 << 20;
  Problem p = cases::problem(GetParam().hidden, GetParam().inter, large ? 3 : std::size(kMixes), 1);
  p.activation.kind = GetParam().activation;
  p.encoding = GetParam().encoding;
  checkpoint::Layer layer = cases::random_layer(p, 7, false);
  spread_scales(&layer.experts);
  const std::vector<std::vector<u8>> expected = packed_on_host(p, layer.experts);
  const Moved first = move_to_device(layer.experts, [](i64 e, int part) { return kMixes[e] >> part & 1; });
  DevicePacked packed(p, first.experts, sm90::kPacking, 0, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), p.experts), expected);

  for (const auto& blob : places(p, packed.table(), p.experts)) {
    throw_unless_ok(gpu::fill(const_cast<std::byte*>(blob.data()), 0xee, std::ssize(blob), nullptr));
  }
  throw_unless_ok(gpu::synchronise(nullptr));
  const Moved second = move_to_device(layer.experts, [](i64 e, int part) { return !(kMixes[e] >> part & 1); });
  packed.refit(second.experts, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), p.experts), expected);
}

INSTANTIATE_TEST_SUITE_P(Device, Packing, testing::ValuesIn(kShapes), [](const auto& at) {
  return std::string(format::encoding_name(at.param.encoding)) + "_" + std::to_string(at.param.hidden) + "x" +
         std::to_string(at.param.inter);
});

// The window of scales that all fit one is that of all, blocks of zeros included, wherever they lie.
TEST(PackingSmall, AnMxfp4WindowIsTheHosts) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(64, 32, 4, 1);
  p.encoding = Encoding::mxfp4;
  checkpoint::Layer layer = cases::random_layer(p, 5, false);
  for (Expert& e : layer.experts) {
    std::fill_n(const_cast<u8*>(e.up.data), 16, u8{0});
    const_cast<u8*>(e.up.scales)[0] = 140;
  }
  constexpr u32 kWhere[] = {0b111111, 0b010101, 0b101010, 0};
  const Moved moved = move_to_device(layer.experts, [&](i64 e, int part) { return kWhere[e] >> part & 1; });
  const DevicePacked packed(p, moved.experts, sm90::kPacking, 0, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 4), packed_on_host(p, layer.experts));
}

TEST(PackingSmall, BiasesOfEitherPlace) {
  FOURMOE_NEEDS_HOPPER();
  const Problem p = cases::problem(64, 48, 3, 1);
  const checkpoint::Layer layer = cases::random_layer(p, 5, true);
  const Moved moved = move_to_device(layer.experts, [](i64 e, int part) { return (e + part) % 2 == 0; });
  const DevicePacked packed(p, moved.experts, sm90::kPacking, 0, tbb_executor());
  const DeviceTable& table = packed.table();
  for (i64 e = 0; e < 3; ++e) {
    const Expert& expert = layer.experts[e];
    for (const auto& [found, expected, count] :
         {std::tuple{table.gate_bias, expert.gate_bias, p.inter}, std::tuple{table.up_bias, expert.up_bias, p.inter},
          std::tuple{table.down_bias, expert.down_bias, p.hidden}}) {
      EXPECT_EQ(fetch_floats(found + e * count, count), std::vector<f32>(expected, expected + count)) << e;
    }
  }
}

// Refit with weights that are refused leaves the blobs as they were.
void expect_refused(DevicePacked* packed, const Problem& p, const std::vector<Expert>& experts, Reason reason,
                    const std::string& words) {
  const auto before = blobs(p, packed->table(), p.experts);
  try {
    packed->refit(experts, tbb_executor());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), reason);
    EXPECT_EQ(error.what(), words);
  }
  EXPECT_EQ(blobs(p, packed->table(), p.experts), before);
}

TEST(PackingRefusal, ABadScaleInTheDevicesMemory) {
  FOURMOE_NEEDS_HOPPER();
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
    Problem p = cases::problem(9600, 64, 3, 1);  // 600 blocks a row of NVFP4: more than a block of threads
    p.encoding = encoding;
    DevicePacked packed(p, cases::random_layer(p, 5, false).experts, sm90::kPacking, 0, tbb_executor());
    checkpoint::Layer bad = cases::random_layer(p, 6, false);
    const i64 last = p.hidden / format::block_of(encoding) - 1;
    const auto put = [&](const format::Matrix& m, i64 row, i64 block, u8 byte) {
      const_cast<u8*>(m.scale_row(row))[block] = byte;
    };
    put(bad.experts[2].gate, 0, 0, 0xff);
    put(bad.experts[1].down, 9599, 1, 0xff);
    put(bad.experts[1].up, 63, last, 0xff);
    put(bad.experts[1].up, 63, 1, 0xff);
    const auto refused = [&](const std::string& words, const Which& which) {
      expect_refused(&packed, p, move_to_device(bad.experts, which).experts, Reason::scale_invalid, words);
    };
    const Which all = [](i64, int) { return true; };
    const Which scales = [](i64, int part) { return part % 2 == 1; };
    refused("up_scale, expert 1, has 0xff at [63, 1]: NaN or negative", all);
    put(bad.experts[1].up, 63, 1, 0x7e);
    refused(fmt::format("up_scale, expert 1, has 0xff at [63, {}]: NaN or negative", last), scales);
    put(bad.experts[1].up, 63, last, 0x7e);
    refused("down_scale, expert 1, has 0xff at [9599, 1]: NaN or negative", all);
    if (encoding == Encoding::mxfp4) continue;
    put(bad.experts[0].gate, 5, 3, 0x80);  // -0
    refused("gate_scale, expert 0, has 0x80 at [5, 3]: NaN or negative", scales);
    put(bad.experts[0].gate, 5, 3, 0x7f);
    refused("gate_scale, expert 0, has 0x7f at [5, 3]: NaN or negative", all);
  }
}

TEST(PackingRefusal, MemoryOfAnotherDevice) {
  FOURMOE_NEEDS_HOPPER();
  if (machine().devices.size() < 2) GTEST_SKIP() << "needs two GPUs";
  const Problem p = cases::problem(64, 48, 2, 1);
  const checkpoint::Layer layer = cases::random_layer(p, 5, true);
  DevicePacked packed(p, layer.experts, sm90::kPacking, 0, tbb_executor());
  for (const auto& [part, name] : {std::pair{2, "up"}, {3, "up_scale"}, {8, "down_bias"}}) {
    std::optional<Moved> moved;
    {
      const gpu::Current other(1);
      moved = move_to_device(layer.experts, [part = part](i64 e, int found) { return e == 1 && found == part; });
    }
    expect_refused(
        &packed, p, moved->experts, Reason::memory_misplaced,
        fmt::format("{} of expert 1 is in memory of cuda:1, expected memory of the host or of cuda:0", name));
  }
}

// A refused refit leaves the layer as it was.
TEST(PackingRefusal, Mxfp4ScalesThatFitNoWindow) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(64, 32, 2, 1);
  p.encoding = Encoding::mxfp4;
  DevicePacked packed(p, cases::random_layer(p, 5, false).experts, sm90::kPacking, 0, tbb_executor());
  const auto before = blobs(p, packed.table(), 2);
  for (const bool on_device : {false, true}) {
    checkpoint::Layer wide = cases::random_layer(p, 6, false);
    u8* scales = const_cast<u8*>(wide.experts[1].up.scales);
    scales[3] = 2;
    scales[4] = 129;
    const Moved moved = move_to_device(wide.experts, [&](i64, int) { return on_device; });
    try {
      packed.refit(moved.experts, tbb_executor());
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.reason(), Reason::encoding_unsupported);
      EXPECT_STREQ(error.what(),
                   "up of expert 1 has E8M0 scales from 2 to 129, 128 powers of two; up to 127 in a row would pass");
    }
  }
  EXPECT_EQ(blobs(p, packed.table(), 2), before);
}

TEST(PackingRefusal, WeightsOfAnotherShapeAreRefused) {
  FOURMOE_NEEDS_HOPPER();
  const Problem p = cases::problem(64, 32, 2, 1);
  DevicePacked packed(p, cases::random_layer(p, 5, false).experts, sm90::kPacking, 0, tbb_executor());
  const Problem wider = cases::problem(64, 48, 2, 1);
  try {
    packed.refit(cases::random_layer(wider, 5, false).experts, tbb_executor());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::tensor_mismatch) << error.what();
  }
}

}  // namespace
}  // namespace fourmoe::weights
