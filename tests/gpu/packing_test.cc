// Packing on the device: bit for bit what the host packs, from host memory in pieces and from the device's own.
#include <cstring>

#include "backends/sm90/tiles.h"
#include "case.h"
#include "gpu/hopper.h"
#include "weights/device_packed.h"

namespace fourmoe::weights {
namespace {

struct Shape {
  i32 hidden;
  i32 inter;
  ActivationKind activation;
};

// Odd sizes; and one projection larger than a piece of staging.
constexpr Shape kShapes[] = {{16, 16, ActivationKind::swiglu},     {64, 80, ActivationKind::swiglu},
                             {2688, 1856, ActivationKind::relu2},  {2880, 352, ActivationKind::geglu_erf},
                             {7168, 2048, ActivationKind::swiglu}, {16, 704, ActivationKind::relu2}};

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
    for (const std::byte* blob : at) all.push_back(fetch(blob, sm90::blob_bytes(r, c)));
  }
  return all;
}

std::vector<std::vector<u8>> packed_on_host(const Problem& p, const std::vector<Expert>& experts) {
  const bool gated = p.activation.gated();
  std::vector<std::vector<u8>> all;
  for (const Expert& e : experts) {
    all.emplace_back(sm90::blob_bytes(gated ? 2 * p.inter : p.inter, p.hidden));
    sm90::pack(gated ? &e.gate : nullptr, e.up, all.back().data());
  }
  for (const Expert& e : experts) {
    all.emplace_back(sm90::blob_bytes(p.hidden, p.inter));
    sm90::pack(nullptr, e.down, all.back().data());
  }
  return all;
}

// Scale bytes of 0 too, whose codes must vanish, and of every subnormal.
void spread_scales(std::vector<Expert>* experts) {
  for (Expert& e : *experts) {
    for (const format::Matrix* m : {&e.gate, &e.up, &e.down}) {
      u8* scales = const_cast<u8*>(m->scales);
      for (i64 i = 0; i < (m->empty() ? 0 : i64{m->rows} * m->scales_stride); i += 3) scales[i] = (i / 3) % 127;
    }
  }
}

class Packing : public testing::TestWithParam<Shape> {};

TEST_P(Packing, EqualsTheHostsBitForBit) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(GetParam().hidden, GetParam().inter, 3, 1);
  p.activation.kind = GetParam().activation;
  checkpoint::Layer layer = cases::random_layer(p, 5, false);
  spread_scales(&layer.experts);
  const DevicePacked packed(p, layer.experts, sm90::kPacking, 0, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 3), packed_on_host(p, layer.experts));
}

TEST_P(Packing, RefitsInPlaceFromTheDevicesOwnMemory) {
  FOURMOE_NEEDS_HOPPER();
  Problem p = cases::problem(GetParam().hidden, GetParam().inter, 2, 1);
  p.activation.kind = GetParam().activation;
  DevicePacked packed(p, cases::random_layer(p, 5, false).experts, sm90::kPacking, 0, tbb_executor());
  const auto addresses = fetch(reinterpret_cast<const std::byte*>(packed.table().gemm1), 16);

  const checkpoint::Layer other = cases::random_layer(p, 6, false);
  std::vector<Expert> moved = other.experts;
  std::vector<gpu::Buffer> memory;
  const auto move = [&](const u8** data, i64 bytes) {
    if (*data == nullptr) return;
    memory.emplace_back();
    throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, bytes + 1, "raw weights", &memory.back()));
    std::byte* at = memory.back().data() + 1;  // any alignment
    throw_unless_ok(gpu::copy(at, *data, bytes, nullptr, "raw weights"));
    *data = reinterpret_cast<const u8*>(at);
  };
  for (Expert& e : moved) {
    for (format::Matrix* m : {&e.gate, &e.up, &e.down}) {
      move(&m->data, m->rows * m->data_stride);
      move(&m->scales, m->rows * m->scales_stride);
    }
  }
  throw_unless_ok(gpu::synchronise(nullptr));
  packed.refit(moved, tbb_executor());
  EXPECT_EQ(blobs(p, packed.table(), 2), packed_on_host(p, other.experts));
  EXPECT_EQ(fetch(reinterpret_cast<const std::byte*>(packed.table().gemm1), 16), addresses);
}

INSTANTIATE_TEST_SUITE_P(Device, Packing, testing::ValuesIn(kShapes), [](const auto& at) {
  return std::to_string(at.param.hidden) + "x" + std::to_string(at.param.inter);
});

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
