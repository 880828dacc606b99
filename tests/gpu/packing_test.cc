// Packing on the device: bit for bit what the host packs, from host memory in pieces and from the device's own.
#include <cstring>

#include "backends/sm90/tiles.h"
#include "case.h"
#include "gpu/hopper.h"
#include "weights/device_packed.h"

namespace fourmoe::weights {
namespace {

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

// Blobs of the table's experts, gemm1 and gemm2 of each in turn.
std::vector<std::vector<u8>> blobs(const Problem& p, const DeviceTable& table, i32 experts) {
  const i32 rows = p.activation.gated() ? 2 * p.inter : p.inter;
  std::vector<const std::byte*> at(static_cast<std::size_t>(experts));
  std::vector<std::vector<u8>> all;
  for (const auto& [addresses, r, c] : {std::tuple{table.gemm1, rows, p.hidden}, {table.gemm2, p.hidden, p.inter}}) {
    const std::vector<u8> bytes = fetch(reinterpret_cast<const std::byte*>(addresses), 8 * experts);
    std::memcpy(at.data(), bytes.data(), bytes.size());
    for (const std::byte* blob : at) all.push_back(fetch(blob, sm90::blob_bytes(r, c, p.encoding)));
  }
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

// The experts' matrices, at odd addresses of the device's memory.
std::vector<gpu::Buffer> move_to_device(std::vector<Expert>* experts) {
  std::vector<gpu::Buffer> memory;
  const auto move = [&](const u8** data, i64 bytes) {
    if (*data == nullptr) return;
    memory.emplace_back();
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes + 1, "raw weights", &memory.back()));
    std::byte* at = memory.back().data() + 1;  // any alignment
    throw_unless_ok(gpu::copy(at, *data, bytes, nullptr, "raw weights"));
    *data = reinterpret_cast<const u8*>(at);
  };
  for (Expert& e : *experts) {
    for (format::Matrix* m : {&e.gate, &e.up, &e.down}) {
      move(&m->data, m->rows * m->data_stride);
      move(&m->scales, m->rows * m->scales_stride);
    }
  }
  throw_unless_ok(gpu::synchronise(nullptr));
  return memory;
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
  std::vector<Expert> moved = other.experts;
  const std::vector<gpu::Buffer> memory = move_to_device(&moved);
  packed.refit(moved, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 2), packed_on_host(p, other.experts));
  EXPECT_EQ(fetch(reinterpret_cast<const std::byte*>(packed.table().gemm1), 16), addresses);
}

INSTANTIATE_TEST_SUITE_P(Device, Packing, testing::ValuesIn(kShapes), [](const auto& at) {
  return std::string(format::encoding_name(at.param.encoding)) + "_" + std::to_string(at.param.hidden) + "x" +
         std::to_string(at.param.inter);
});

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
    std::vector<gpu::Buffer> memory;
    if (on_device) memory = move_to_device(&wide.experts);
    try {
      packed.refit(wide.experts, tbb_executor());
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
