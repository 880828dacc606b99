// Layers of weights in the GPU's memory: the bits of those of the host's, what is kept of them, lists of tensors.
#include <cmath>

#include "case.h"
#include "gpu/hopper.h"
#include "gpu/moved.h"
#include "mirror.h"
#include "weights/stacks.h"

namespace fourmoe::weights {
namespace {

using cases::move_to_device;
using cases::Moved;
using cases::spec;
using cases::Spec;
using format::Dtype;
using format::Encoding;

LayerOptions options(const Spec& s) {
  LayerOptions o;
  o.precision = s.problem.precision;
  o.device = 0;
  o.max_tokens = 64;
  return o;
}

checkpoint::Layer with(const checkpoint::Layer& layer, std::vector<Expert> experts) {
  checkpoint::Layer made = layer;
  made.experts = std::move(experts);
  return made;
}

std::vector<u8> run(Layer* layer, const Spec& s) {
  const cases::Call call(s);
  std::vector<u8> output;
  throw_unless_ok(cases::run_mirrored(layer, call.view(&output, Dtype::f32)));
  return output;
}

std::vector<Spec> specs() {
  std::vector<Spec> all;
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4, Encoding::bf16}) {
    for (const Precision precision : {Precision::w4a16, Precision::w4a4}) {
      if (precision == Precision::w4a4 && encoding == Encoding::bf16) continue;
      all.push_back(spec(96, 64, 6, 2, 9));
      all.back().problem.encoding = encoding;
      all.back().problem.precision = precision;
      all.back().biases = true;
    }
  }
  return all;
}

// Memory that is freed, and held NaN before, must not be read again.
TEST(DeviceWeights, AreReadOnceAndTheirMemoryMayBeFreed) {
  FOURMOE_NEEDS_HOPPER();
  for (const Spec& s : specs()) {
    const checkpoint::Layer first = cases::random_layer(s.problem, 5, s.biases);
    const checkpoint::Layer second = cases::random_layer(s.problem, 6, s.biases);
    Layer host(first, options(s));
    Moved moved = move_to_device(first.experts);
    Layer device(with(first, moved.experts), options(s));
    moved.destroy();
    const std::vector<u8> before = run(&device, s);
    EXPECT_EQ(before, run(&host, s)) << cases::describe(s);

    host.refit(second);
    moved = move_to_device(second.experts, [](i64 expert, int part) { return (expert + part) % 3 != 0; });
    device.refit(with(second, moved.experts));
    moved.destroy();
    EXPECT_EQ(run(&device, s), run(&host, s)) << cases::describe(s);
    EXPECT_NE(run(&device, s), before) << cases::describe(s);
    EXPECT_EQ(device.packed_bytes(), host.packed_bytes());
  }
}

TEST(DeviceWeights, AreForgottenAndThoseOfTheHostAreNot) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = specs().front();
  const checkpoint::Layer layer = cases::random_layer(s.problem, 5, true);
  const Moved moved = move_to_device(layer.experts, [](i64 expert, int part) { return expert == 1 || part == 3; });
  const Layer device(with(layer, moved.experts), options(s));
  const Expert& mixed = device.weights().experts[0];
  EXPECT_EQ(mixed.gate.data, layer.experts[0].gate.data);
  EXPECT_EQ(mixed.up.data, nullptr);  // its scales were the device's
  EXPECT_EQ(mixed.up.scales, nullptr);
  EXPECT_EQ(mixed.up_bias, layer.experts[0].up_bias);
  EXPECT_EQ(mixed.up.bytes(), layer.experts[0].up.bytes());
  const Expert& gone = device.weights().experts[1];
  EXPECT_TRUE(gone.gate.empty() && gone.up.empty() && gone.down.empty());
  EXPECT_TRUE(gone.gate_bias == nullptr && gone.up_bias == nullptr && gone.down_bias == nullptr);
  try {
    const Layer again(device.weights(), options(s));
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::tensor_mismatch) << error.what();
  }
}

// What is refused is not kept either.
TEST(DeviceWeights, ARefusedRefitLeavesTheLayer) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = specs().front();
  const checkpoint::Layer layer = cases::random_layer(s.problem, 5, true);
  Layer device(layer, options(s));
  const std::vector<u8> before = run(&device, s);
  {
    checkpoint::Layer bad = cases::random_layer(s.problem, 6, true);
    const_cast<u8*>(bad.experts[5].down.scales)[0] = 0xff;
    Moved moved = move_to_device(bad.experts);
    try {
      device.refit(with(bad, moved.experts));
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.reason(), Reason::scale_invalid) << error.what();
    }
    moved.destroy();
  }
  EXPECT_EQ(run(&device, s), before);
  EXPECT_EQ(device.weights().experts[5].down.data, layer.experts[5].down.data);
}

// Calls that are enqueued when a refit begins compute with the old weights.
TEST(DeviceWeights, ARefitWaitsForCallsOfAnyStream) {
  FOURMOE_NEEDS_HOPPER();
  Spec s = spec(2048, 768, 16, 8, 64);
  const checkpoint::Layer first = cases::random_layer(s.problem, 5, false);
  const Moved second = move_to_device(cases::random_layer(s.problem, 6, false).experts);
  Layer device(first, options(s));
  const std::vector<u8> expected = run(&device, s);
  const cases::Call call(s);
  std::vector<u8> output;
  cases::Mirror mirror(device, call.view(&output, Dtype::f32));
  gpu::OwnStream stream;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  mirror.call().stream = stream.get();
  for (int repeat = 0; repeat < 50; ++repeat) throw_unless_ok(device.run(mirror.call()));
  device.refit(with(first, second.experts));
  throw_unless_ok(device.wait(stream.get()));
  mirror.fetch();
  EXPECT_EQ(output, expected);
}

// A stack [experts, ...] of one tensor of the device's memory, or of a list whose odd pieces are the host's.
struct Pieces {
  std::vector<std::vector<u8>> host;
  Moved device;

  Splits make(const std::string& name, Element element, const std::vector<std::vector<u8>>& each, std::vector<i64> rest,
              bool mixed) {
    std::vector<Split> list;
    std::vector<i64> strides(rest.size() + 1, 1);
    for (std::size_t d = rest.size(); d-- > 0;) strides[d] = strides[d + 1] * rest[d];
    const std::size_t step = mixed ? 2 : each.size();
    for (std::size_t e = 0; e < each.size(); e += step) {
      std::vector<u8> bytes;
      const std::size_t count = std::min(step, each.size() - e);
      for (std::size_t i = e; i < e + count; ++i) bytes.insert(bytes.end(), each[i].begin(), each[i].end());
      Split split;
      split.element = element;
      split.shape = rest;
      split.shape.insert(split.shape.begin(), static_cast<i64>(count));
      split.strides = strides;
      split.device = mixed && e / step % 2 == 1 ? -1 : 0;
      if (split.device == 0) split.data = static_cast<const u8*>(device.take(bytes.data(), std::ssize(bytes), 0));
      else split.data = host.emplace_back(std::move(bytes)).data();
      list.push_back(std::move(split));
    }
    return Splits(name, std::move(list), 0);
  }
};

template <class T>
std::vector<u8> bytes_of(const T* data, i64 count) {
  const u8* begin = reinterpret_cast<const u8*>(data);
  return {begin, begin + count * static_cast<i64>(sizeof(T))};
}

Stack stack(Pieces* pieces, const std::string& name, const std::vector<Expert>& experts, format::Matrix Expert::*which,
            const f32* Expert::*bias, bool mixed) {
  std::vector<std::vector<u8>> codes, scales, globals, biases;
  const format::Matrix& shape = experts[0].*which;
  for (const Expert& e : experts) {
    const format::Matrix& m = e.*which;
    codes.push_back(bytes_of(m.data, m.rows * m.data_stride));
    scales.push_back(bytes_of(m.scales, m.rows * m.scales_stride));
    globals.push_back(bytes_of(&m.global, 1));
    biases.push_back(bytes_of(e.*bias, m.rows));
  }
  Stack made;
  made.codes = pieces->make(name, Element::u8, codes, {shape.rows, shape.data_stride}, mixed);
  made.scales = pieces->make(name + "_scale", Element::e4m3, scales, {shape.rows, shape.scales_stride}, mixed);
  made.globals = pieces->make(name + "_global", Element::f32, globals, {}, !mixed);
  made.bias = pieces->make(name + "_bias", Element::f32, biases, {shape.rows}, mixed);
  return made;
}

TEST(DeviceWeights, StacksOfTensorsGiveTheTableOfTheHosts) {
  FOURMOE_NEEDS_HOPPER();
  const Spec s = specs()[1];  // w4a4: with scales of inputs
  const checkpoint::Layer layer = cases::random_layer(s.problem, 5, true);
  Layer host(layer, options(s));
  const std::vector<u8> expected = run(&host, s);
  for (const bool mixed : {false, true}) {
    Pieces pieces;
    std::vector<std::vector<u8>> inputs, inters;
    for (const Expert& e : layer.experts) {
      inputs.push_back(bytes_of(&e.input_scale, 1));
      inters.push_back(bytes_of(&e.inter_scale, 1));
    }
    Stacks stacks;
    stacks.gate = stack(&pieces, "gate", layer.experts, &Expert::gate, &Expert::gate_bias, mixed);
    stacks.up = stack(&pieces, "up", layer.experts, &Expert::up, &Expert::up_bias, mixed);
    stacks.down = stack(&pieces, "down", layer.experts, &Expert::down, &Expert::down_bias, mixed);
    stacks.input_scale = pieces.make("input_scale", Element::f32, inputs, {}, mixed);
    stacks.inter_scale = pieces.make("inter_scale", Element::f32, inters, {}, mixed);
    throw_unless_ok(gpu::synchronise(nullptr));
    Assembled made = assemble(stacks, true, tbb_executor());
    for (std::size_t e = 0; e < made.experts.size(); ++e) {
      EXPECT_EQ(made.experts[e].down.global, layer.experts[e].down.global);
      EXPECT_EQ(made.experts[e].input_scale, layer.experts[e].input_scale);
      EXPECT_EQ(made.experts[e].gate_bias[s.problem.inter - 1], layer.experts[e].gate_bias[s.problem.inter - 1]);
    }
    checkpoint::Layer source = with(layer, std::move(made.experts));
    source.owner = made.owner;
    Layer device(std::move(source), options(s));
    pieces.device.destroy();
    EXPECT_EQ(run(&device, s), expected) << mixed;
  }
}

TEST(DeviceWeights, NumbersAreCheckedAsTheHostsAre) {
  FOURMOE_NEEDS_HOPPER();
  Pieces pieces;
  const std::vector<f32> values = {1.0f, 0.5f, NAN, 2.0f};
  std::vector<std::vector<u8>> each;
  for (const f32& value : values) each.push_back(bytes_of(&value, 1));
  const checkpoint::Layer layer = cases::random_layer(cases::problem(32, 16, 4, 1), 5, true);
  Stacks stacks;
  stacks.gate = stack(&pieces, "gate", layer.experts, &Expert::gate, &Expert::gate_bias, false);
  stacks.up = stack(&pieces, "up", layer.experts, &Expert::up, &Expert::up_bias, false);
  stacks.down = stack(&pieces, "down", layer.experts, &Expert::down, &Expert::down_bias, false);
  stacks.up.globals = pieces.make("up_global", Element::f32, each, {}, false);
  throw_unless_ok(gpu::synchronise(nullptr));
  try {
    assemble(stacks, true, tbb_executor());
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::global_invalid);
    EXPECT_STREQ(error.what(), "up_global, expert 2, is nan, expected finite and above 0");
  }
}

TEST(DeviceWeights, CopiesOfTensorsOfAnyStrides) {
  FOURMOE_NEEDS_HOPPER();
  std::vector<f32> values(30);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<f32>(i);
  Moved moved;
  Split wide;
  wide.element = Element::f32;
  wide.data = static_cast<const u8*>(moved.take(values.data(), 120, 0));
  wide.device = 0;
  wide.shape = {3, 4};
  wide.strides = {10, 1};
  Split close = wide;
  close.shape = {2, 4};
  close.strides = {4, 1};
  Split same = wide;
  same.shape = {2, 4};
  same.strides = {0, 1};  // as torch's expand makes them
  throw_unless_ok(gpu::synchronise(nullptr));
  const std::vector<u8> bytes = Splits("up_bias", {wide, close, same}, 0).copy();
  const std::vector<f32> expected = {0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 0, 1,
                                     2, 3, 4, 5, 6,  7,  0,  1,  2,  3,  0,  1,  2, 3};
  EXPECT_EQ(bytes, bytes_of(expected.data(), std::ssize(expected)));
}

}  // namespace
}  // namespace fourmoe::weights
