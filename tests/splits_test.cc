// Lists of weight tensors: where each expert lies, and every refusal with the words that name the split.
#include "weights/splits.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>

#include "format/row_order.h"
#include "format/scale_layout.h"
#include "status.h"
#include "weights/stacks.h"

namespace fourmoe::weights {
namespace {

std::vector<i64> contiguous(const std::vector<i64>& shape) {
  std::vector<i64> strides(shape.size(), 1);
  for (std::size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

Split split(const void* data, Element element, std::vector<i64> shape, i32 device = -1) {
  Split made;
  made.data = static_cast<const u8*>(data);
  made.element = element;
  made.strides = contiguous(shape);
  made.shape = std::move(shape);
  made.device = device;
  return made;
}

std::string words_of(const std::function<void()>& call, Reason reason) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), reason);
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Splits, FindEveryExpertInAnySizes) {
  std::vector<u8> memory(7 * 6);
  std::iota(memory.begin(), memory.end(), u8{0});
  for (const std::vector<i64>& sizes : {std::vector<i64>{7}, {1, 1, 1, 1, 1, 1, 1}, {2, 5}, {1, 5, 1}}) {
    std::vector<Split> list;
    i64 first = 0;
    for (const i64 size : sizes) {
      list.push_back(split(memory.data() + first * 6, Element::u8, {size, 2, 3}));
      first += size;
    }
    const Splits splits("up", list);
    ASSERT_EQ(splits.experts(), 7);
    for (i64 e = 0; e < 7; ++e) {
      EXPECT_EQ(splits.at(e), memory.data() + e * 6);
      EXPECT_EQ(splits.row_stride(e), 3);
    }
    EXPECT_EQ(splits.name_of(6), sizes.size() == 1 ? "up" : "up[" + std::to_string(sizes.size() - 1) + "]");
  }
}

TEST(Splits, StridesOfEachSplitAreItsOwn) {
  std::vector<f32> memory(100);
  Split wide = split(memory.data(), Element::f32, {2, 3, 4});
  wide.strides = {20, 5, 1};
  const Splits splits("down", {wide, split(memory.data() + 60, Element::f32, {1, 3, 4})});
  EXPECT_EQ(splits.at(1), reinterpret_cast<const u8*>(memory.data() + 20));
  EXPECT_EQ(splits.row_stride(1), 5);
  EXPECT_EQ(splits.row_stride(2), 4);
}

TEST(Splits, RefusalsNameTheSplit) {
  const u8 memory[64] = {};
  const auto good = split(memory, Element::u8, {2, 2, 4});
  const auto refused = [&](std::vector<Split> list, Reason reason, i32 device = -1) {
    return words_of([&] { Splits("gate", std::move(list), device); }, reason);
  };
  EXPECT_EQ(refused({}, Reason::argument_invalid), "gate is an empty list, expected at least one tensor");
  EXPECT_EQ(refused({good, split(memory, Element::u8, {0, 2, 4})}, Reason::argument_invalid),
            "gate[1] is [0, 2, 4], expected at least one expert in its first dimension");
  EXPECT_EQ(refused({good, good, split(memory, Element::u8, {1, 2, 5})}, Reason::argument_invalid),
            "gate[2] is [1, 2, 5], expected [experts, 2, 4] as in gate[0]");
  EXPECT_EQ(refused({good, split(memory, Element::e4m3, {1, 2, 4})}, Reason::dtype_unsupported),
            "gate[1] is float8_e4m3fn, expected u8 as in gate[0]");
  const Split there = split(memory, Element::u8, {1, 2, 4}, 3);
  EXPECT_EQ(refused({good, there}, Reason::memory_misplaced), "gate[1] is on cuda:3, expected cpu, where the layer is");
  EXPECT_EQ(refused({there}, Reason::memory_misplaced, 0),
            "gate is on cuda:3, expected cpu or cuda:0, where the layer is");
  Split apart = good;
  apart.strides[2] = 2;
  EXPECT_EQ(refused({apart}, Reason::stride_unsupported), "gate has elements of a row 2 apart, expected adjacent ones");
}

TEST(Splits, EachMayLieInEitherPlace) {
  const u8 memory[64] = {};
  const Splits splits("gate", {split(memory, Element::u8, {2, 2, 4}), split(memory, Element::u8, {1, 2, 4}, 3)}, 3);
  EXPECT_TRUE(splits.on_host(0) && splits.on_host(1));
  EXPECT_FALSE(splits.on_host(2));
}

TEST(Splits, CopiesFollowTheStrides) {
  std::vector<f32> memory(30);
  std::iota(memory.begin(), memory.end(), 0.0f);
  Split wide = split(memory.data(), Element::f32, {2, 3});
  wide.strides = {10, 1};
  Split same = wide;
  same.strides = {0, 1};
  const std::vector<u8> bytes = Splits("up_bias", {wide, split(memory.data() + 20, Element::f32, {1, 3}), same}).copy();
  const std::vector<f32> expected = {0, 1, 2, 10, 11, 12, 20, 21, 22, 0, 1, 2, 0, 1, 2};
  ASSERT_EQ(bytes.size(), expected.size() * sizeof(f32));
  EXPECT_EQ(std::memcmp(bytes.data(), expected.data(), bytes.size()), 0);
}

// A layer of E experts, hidden 32, inter 16, all scales 1.
struct Sample {
  std::vector<u8> codes = std::vector<u8>(4 * 16 * 32 / 2, 0x21);
  std::vector<u8> scales = std::vector<u8>(4 * 16 * 32 / 16, 0x38);
  std::vector<f32> globals = {0.5f, 1.0f, 2.0f, 4.0f};

  Stack stack(const std::string& name, i64 rows, i64 cols) const {
    Stack made;
    made.codes = Splits(name, {split(codes.data(), Element::u8, {3, rows, cols / 2}),
                               split(codes.data(), Element::u8, {1, rows, cols / 2})});
    made.scales = Splits(name + "_scale", {split(scales.data(), Element::e4m3, {4, rows, cols / 16})});
    made.globals = Splits(name + "_global",
                          {split(globals.data(), Element::f32, {1}), split(globals.data() + 1, Element::f32, {3})});
    return made;
  }

  Stacks stacks() const { return {stack("gate", 16, 32), stack("up", 16, 32), stack("down", 32, 16), {}, {}}; }
};

TEST(Stacks, BecomeAnExpertTable) {
  const Sample sample;
  const Assembled made = assemble(sample.stacks(), true, tbb_executor(1));
  ASSERT_EQ(made.experts.size(), 4u);
  EXPECT_EQ(made.hidden, 32);
  EXPECT_EQ(made.inter, 16);
  EXPECT_EQ(made.encoding, format::Encoding::nvfp4);
  EXPECT_EQ(made.experts[2].up.global, 2.0f);
  EXPECT_EQ(made.experts[3].down.data, sample.codes.data());
  EXPECT_EQ(made.experts[1].gate.data, sample.codes.data() + 16 * 16);
  EXPECT_EQ(made.experts[0].up_bias, nullptr);
  EXPECT_EQ(made.experts[0].input_scale, 1.0f);
}

// Codes and scales of a GPU's memory are addresses, which the host must not read.
TEST(Stacks, OfAGpuAreNotRead) {
  const Sample sample;
  Stacks stacks = sample.stacks();
  const u8* nowhere = reinterpret_cast<const u8*>(std::uintptr_t{4096});
  stacks.up.codes = Splits("up", {split(nowhere, Element::u8, {4, 16, 16}, 0)}, 0);
  stacks.up.scales =
      Splits("up_scale",
             {split(sample.scales.data(), Element::e4m3, {1, 16, 2}), split(nowhere, Element::e4m3, {3, 16, 2}, 0)}, 0);
  const Assembled made = assemble(stacks, true, tbb_executor(2));
  EXPECT_EQ(made.experts[1].up.data, nowhere + 256);
  EXPECT_EQ(made.experts[0].up.scales, sample.scales.data());
  EXPECT_EQ(made.experts[2].up.scales, nowhere + 32);
}

TEST(Stacks, BiasesAreWidenedAndKept) {
  Sample sample;
  const std::vector<u16> bias(4 * 16, format::to_bf16(1.5f));
  Stacks stacks = sample.stacks();
  stacks.up.bias = Splits("up_bias", {split(bias.data(), Element::bf16, {4, 16})});
  const Assembled made = assemble(stacks, true, tbb_executor(1));
  EXPECT_EQ(made.experts[3].up_bias[15], 1.5f);
  EXPECT_EQ(made.experts[3].gate_bias, nullptr);
}

TEST(Stacks, RefuseWhatDoesNotFit) {
  Sample sample;
  const auto refused = [&](const std::function<void(Stacks*)>& change, Reason reason, bool gated = true) {
    Stacks stacks = sample.stacks();
    change(&stacks);
    return words_of([&] { assemble(stacks, gated, tbb_executor(2)); }, reason);
  };
  EXPECT_EQ(refused([](Stacks* s) { s->gate = {}; }, Reason::argument_invalid), "gate is missing; only relu2 has none");
  EXPECT_EQ(refused([](Stacks*) {}, Reason::argument_invalid, false), "gate is given, but relu2 has none");
  EXPECT_EQ(refused([&](Stacks* s) { s->down = sample.stack("down", 16, 32); }, Reason::argument_invalid),
            "down is [16, 32], expected [32, 16] to go with up [16, 32] (columns unpacked)");
  EXPECT_EQ(refused([](Stacks* s) { s->up.scales = {}; }, Reason::argument_invalid),
            "up is u8, so its block scales are needed: up_scale is missing");
  EXPECT_EQ(
      refused(
          [&](Stacks* s) { s->up.globals = Splits("up_global", {split(sample.globals.data(), Element::f32, {3})}); },
          Reason::argument_invalid),
      "up_global is for 3 experts, up for 4");
  sample.globals[3] = -1.0f;
  EXPECT_EQ(refused([](Stacks*) {}, Reason::global_invalid),
            "gate_global[1], expert 3, is -1, expected finite and above 0");
  sample.globals[3] = 1.0f;
  sample.scales[2 * 32 + 5] = 0x7f;
  EXPECT_EQ(refused([](Stacks*) {}, Reason::scale_invalid),
            "gate_scale, expert 2, has 0x7f at [2, 1]: NaN or negative");
}

TEST(ScaleLayout, ReadsAtomsInAnyStrides) {
  std::vector<u8> memory(2 * 256 * 8);
  format::AtomView atoms{memory.data(), {32, 4, 2, 4, 2, 2}, {16, 4, 1024, 1, 512, 2048}};
  for (i64 m = 0; m < 2; ++m) {
    for (i64 r = 0; r < 256; ++r) {
      for (i64 b = 0; b < 8; ++b) {
        const i64 at = (r / 128 * 2 + b / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + b % 4;
        memory[m * 2048 + at] = static_cast<u8>(m * 100 + r * 3 + b * 7);
      }
    }
  }
  std::vector<u8> linear(256 * 8);
  format::read_linear(atoms, 1, linear.data());
  for (i64 r = 0; r < 256; ++r) {
    for (i64 b = 0; b < 8; ++b) ASSERT_EQ(linear[r * 8 + b], static_cast<u8>(100 + r * 3 + b * 7));
  }
}

TEST(RowOrder, HalvesInGroups) {
  const format::RowOrder blocks{64, true};
  EXPECT_EQ(blocks.up_row(0), 0);
  EXPECT_EQ(blocks.gate_row(0), 64);
  EXPECT_EQ(blocks.up_row(64), 128);
  EXPECT_EQ(blocks.gate_row(127), 255);
  const format::RowOrder alternating{1, false};
  EXPECT_EQ(alternating.gate_row(5), 10);
  EXPECT_EQ(alternating.up_row(5), 11);
}

}  // namespace
}  // namespace fourmoe::weights
