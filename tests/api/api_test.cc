// The public faces, C and C++, as a program that links only the shared library sees them.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "fourmoe/fourmoe.hpp"

namespace {

constexpr int kHidden = 32, kInter = 16, kExperts = 4, kTopK = 2;

// A layer whose every weight is `value`: gate and up see sum(x) * value, so the output is known in closed form.
struct Constant {
  explicit Constant(std::uint8_t code = 0x22, std::uint8_t scale = 0x38, float global = 0.125f)
      : codes(kHidden * kInter / 2, code), scales(kHidden * kInter / 16, scale) {
    const fourmoe_matrix matrix{codes.data(), scales.data(), 0, 0, global, 0};
    fourmoe_expert expert{};
    expert.gate = expert.up = expert.down = matrix;
    experts.assign(kExperts, expert);
    desc.struct_size = sizeof desc;
    desc.hidden = kHidden;
    desc.inter = kInter;
    desc.experts = kExperts;
    desc.top_k = kTopK;
    desc.expert_table = experts.data();
    desc.renormalise = 1;
  }
  std::vector<std::uint8_t> codes, scales;
  std::vector<fourmoe_expert> experts;
  fourmoe_layer_desc desc{};
};

struct Buffers {
  explicit Buffers(int tokens)
      : x(tokens * kHidden, 0.5f), y(tokens * kHidden, NAN), ids(tokens * kTopK), w(tokens * kTopK, 0.5f) {
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int32_t>(i % kExperts);
    call.hidden_states = fourmoe::view(x.data(), FOURMOE_F32, tokens, kHidden);
    call.topk_ids = fourmoe::view(ids.data(), FOURMOE_I32, tokens, kTopK);
    call.topk_weights = fourmoe::view(w.data(), FOURMOE_F32, tokens, kTopK);
    call.output = fourmoe::view(y.data(), FOURMOE_F32, tokens, kHidden);
  }
  std::vector<float> x, y;
  std::vector<std::int32_t> ids;
  std::vector<float> w;
  fourmoe::Call call;
};

// Weight 1 * 0.125: gate = up = 32 * 0.5 * 0.125 = 2; silu(2) * 2 rounded to bf16; times 16 * 0.125.
float expected() {
  const float y = 2.0f / (1.0f + std::exp(-2.0f)) * 2.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &y, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, 4);
  return rounded * 16 * 0.125f;
}

template <class Body>
void expect_error(const char* name, const std::string& words, const Body& body) {
  try {
    body();
    FAIL() << "accepted; expected " << name;
  } catch (const fourmoe::Error& error) {
    EXPECT_EQ(error.name(), name) << error.what();
    EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
  }
}

TEST(Api, ComputesALayerGivenTensorByTensor) {
  const Constant weights;
  for (const char* backend : {"auto", "cpu", "reference"}) {
    fourmoe::Options options;
    options.backend = backend;
    fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
    Buffers b(3);
    layer.run(b.call);
    for (const float value : b.y) EXPECT_NEAR(value, expected(), 1e-5f) << backend;
  }
}

TEST(Api, RoutesFromLogitsAndReturnsThePicks) {
  const Constant weights;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc);
  Buffers b(1);
  std::vector<float> logits = {0.0f, 3.0f, 1.0f, 2.0f};
  b.call.topk_ids = b.call.topk_weights = {};
  b.call.router_logits = fourmoe::view(logits.data(), FOURMOE_F32, 1, kExperts);
  std::int32_t ids[kTopK];
  float picked[kTopK];
  b.call.picked_ids = ids;
  b.call.picked_weights = picked;
  layer.run(b.call);
  EXPECT_EQ(ids[0], 1);
  EXPECT_EQ(ids[1], 3);
  EXPECT_NEAR(picked[0] + picked[1], 1.0f, 1e-6f);
  EXPECT_NEAR(b.y[0], expected(), 1e-5f);
}

// Tokens of one value have that value's int8 code 127 and lose nothing; more is in the tests of the layer.
TEST(Api, ComputesWithInt8ActivationsWhereAskedTo) {
  const Constant weights;
  fourmoe::Options options;
  EXPECT_EQ(fourmoe::Layer::create(weights.desc, options).info().precision, FOURMOE_W4A16);
  options.precision = FOURMOE_W4A8_INT8;
  for (const char* backend : {"auto", "cpu", "reference"}) {
    options.backend = backend;
    fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
    EXPECT_EQ(layer.info().precision, FOURMOE_W4A8_INT8);
    Buffers b(3);
    layer.run(b.call);
    for (const float value : b.y) EXPECT_NEAR(value, expected(), 1e-5f) << backend;
  }
  options.precision = static_cast<fourmoe_precision>(3);
  expect_error("argument_invalid", "options.precision is 3, expected 0 to 2",
               [&] { fourmoe::Layer::create(weights.desc, options); });
  options.precision = FOURMOE_W4A16;
  options.threads = 1025;
  expect_error("argument_invalid", "options.threads is 1025, expected 0 to 1024",
               [&] { fourmoe::Layer::create(weights.desc, options); });
}

// Code 6 (0x7), scale 1 (0x38) and input_scale 1/12 are tokens of 0.5, as the layer itself quantises them. inter_scale
// is such that the intermediate, one value in all columns, is 6 * 448 * inter_scale.
TEST(Api, TakesTokensThatAreNvfp4Already) {
  Constant weights;
  for (fourmoe_expert& expert : weights.experts) {
    expert.input_scale = 1.0f / 12.0f;
    expert.inter_scale = expected() / (16 * 0.125f) / (6.0f * 448.0f);
  }
  fourmoe::Options options;
  options.precision = FOURMOE_W4A4;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
  Buffers values(3), codes(3);
  layer.run(values.call);
  std::vector<std::uint8_t> pairs(3 * kHidden / 2, 0x77), scales(3 * kHidden / 16, 0x38);
  codes.call.hidden_states = fourmoe::view(pairs.data(), FOURMOE_U8, 3, kHidden / 2);
  codes.call.hidden_scales = fourmoe::view(scales.data(), FOURMOE_U8, 3, kHidden / 16);
  layer.run(codes.call);
  EXPECT_NEAR(codes.y[0], expected(), 1e-5f);
  EXPECT_EQ(codes.y, values.y);
  scales[3] = 0xff;
  expect_error("scale_invalid", "hidden_scales[1, 1] is 0xff", [&] { layer.run(codes.call); });
  scales[3] = 0x38;
  codes.call.hidden_scales = {};
  expect_error("argument_invalid", "hidden_states is [3, 16], expected [3, 32]", [&] { layer.run(codes.call); });
  options.precision = FOURMOE_W4A16;
  codes.call.hidden_scales = fourmoe::view(scales.data(), FOURMOE_U8, 3, kHidden / 16);
  expect_error("argument_invalid", "w4a4 without routing weights on the input would pass",
               [&] { fourmoe::Layer::create(weights.desc, options).run(codes.call); });
}

TEST(Api, ReportsWhatALayerIs) {
  const Constant weights;
  fourmoe::Options options;
  options.max_tokens = 7;
  options.tuning = "no/such/file";
  const fourmoe_layer_info info = fourmoe::Layer::create(weights.desc, options).info();
  EXPECT_EQ(info.hidden, kHidden);
  EXPECT_EQ(info.local_experts, kExperts);
  EXPECT_EQ(info.max_tokens, 7);
  EXPECT_EQ(info.weight_bytes, kExperts * 3 * kHidden * kInter * 9 / 16);
  EXPECT_GE(info.packed_bytes, info.weight_bytes);
  EXPECT_GT(info.workspace_bytes, 0);
  EXPECT_EQ(info.has_router, 0);
}

TEST(Api, TakesTheCallersWorkspaceAndThreads) {
  const Constant weights;
  std::atomic<int> tasks{0};
  fourmoe_executor pool{};
  pool.context = &tasks;
  pool.threads = 2;
  pool.run = [](void* context, std::int64_t count, void (*task)(void*, std::int64_t), void* task_context) {
    *static_cast<std::atomic<int>*>(context) += static_cast<int>(count);
    for (std::int64_t i = count; i-- > 0;) task(task_context, i);  // any order is legal
  };
  fourmoe::Options options;
  options.executor = &pool;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
  const std::int64_t bytes = layer.info().workspace_bytes;
  std::vector<unsigned char> memory(bytes + 64);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
  Buffers b(3);
  layer.run(b.call, aligned, bytes);
  EXPECT_NEAR(b.y[5], expected(), 1e-5f);
  EXPECT_GT(tasks, 0);
  EXPECT_THROW(layer.run(b.call, aligned, bytes - 1), fourmoe::Error);
}

int threads_of_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<int>(std::distance(begin(tasks), end(tasks)));
}

TEST(Api, StartsNoThreadBesideTheCallersPool) {
  const Constant weights;
  fourmoe_executor pool{};
  pool.threads = 2;
  pool.run = [](void*, std::int64_t count, void (*task)(void*, std::int64_t), void* task_context) {
    for (std::int64_t i = 0; i < count; ++i) task(task_context, i);
  };
  fourmoe::Options options;
  options.executor = &pool;
  const int before = threads_of_process();
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
  Buffers b(64);
  layer.run(b.call);
  EXPECT_EQ(threads_of_process(), before);
}

TEST(Api, OneLayerServesManyThreads) {
  const Constant weights;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc);
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) {
        Buffers b(5);
        layer.run(b.call);
        for (const float value : b.y) wrong += std::fabs(value - expected()) > 1e-5f;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Api, RefusalsNameTheArgument) {
  Constant weights;
  weights.desc.hidden = 40;
  expect_error("shape_unsupported", "48 would pass", [&] { fourmoe::Layer::create(weights.desc); });
  weights.desc.hidden = kHidden;
  weights.desc.struct_size = 8;
  expect_error("argument_invalid", "desc.struct_size is 8", [&] { fourmoe::Layer::create(weights.desc); });
  weights.desc.struct_size = sizeof weights.desc;
  weights.experts[2].up.global_scale = NAN;
  expect_error("argument_invalid", "up of expert 2", [&] { fourmoe::Layer::create(weights.desc); });
  weights.experts[2].up.global_scale = 1.0f;
  weights.experts[1].down.data = nullptr;
  expect_error("argument_invalid", "down of expert 1", [&] { fourmoe::Layer::create(weights.desc); });
  weights.experts[1].down.data = weights.codes.data();
  weights.desc.activation = 17;
  expect_error("argument_invalid", "activation is 17", [&] { fourmoe::Layer::create(weights.desc); });
  weights.desc.activation = 0;
  weights.scales[3] = 0x7f;
  expect_error("scale_invalid", "expert 0", [&] { fourmoe::Layer::create(weights.desc); });
  weights.scales[3] = 0x38;
  fourmoe::Options options;
  options.backend = "tpu";
  expect_error("argument_invalid", "'tpu'", [&] { fourmoe::Layer::create(weights.desc, options); });
  expect_error("file_unreadable", "no-such-folder", [] { fourmoe::Checkpoint("no-such-folder"); });
}

TEST(Api, WaitingOnTheHostIsImmediate) {
  const Constant weights;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc);
  EXPECT_EQ(layer.info().device, -1);
  Buffers b(3);
  layer.run(b.call);
  layer.wait();
  EXPECT_NEAR(b.y[0], expected(), 1e-5f);
}

TEST(Api, RefitTakesOtherWeightsOfTheSameShapes) {
  const Constant weights;
  for (const char* backend : {"cpu", "reference"}) {
    fourmoe::Options options;
    options.backend = backend;
    fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
    Buffers before(3), after(3), fresh(3);
    layer.run(before.call);
    const Constant other(0x33, 0x39, 0.25f);
    layer.refit(other.desc);
    layer.run(after.call);
    fourmoe::Layer::create(other.desc, options).run(fresh.call);
    EXPECT_NE(after.y, before.y) << backend;
    EXPECT_EQ(after.y, fresh.y) << backend;
    Constant wider;
    wider.desc.experts = wider.desc.local_experts = 3;
    expect_error("tensor_mismatch", "expected 4 experts", [&] { layer.refit(wider.desc); });
    Constant clamped;
    clamped.desc.activation = FOURMOE_SWIGLU_CLAMPED;
    clamped.desc.alpha = clamped.desc.beta = 1.0f;
    clamped.desc.limit = 7.0f;
    fourmoe::Layer limited = fourmoe::Layer::create(clamped.desc, options);
    clamped.desc.limit = 10.0f;
    expect_error("tensor_mismatch", "limit 7", [&] { limited.refit(clamped.desc); });
    Constant biased;
    const std::vector<float> bias(kExperts, 0.5f);
    biased.desc.selection_bias = bias.data();
    expect_error("tensor_mismatch", "swiglu, a selection bias, expected 4", [&] { layer.refit(biased.desc); });
    Constant part;
    part.desc.experts = 2 * kExperts;
    part.desc.first_expert = 3;
    part.desc.local_experts = kExperts;
    expect_error("tensor_mismatch", "from expert 3 of 8, expected 4", [&] { layer.refit(part.desc); });
  }
}

TEST(Api, DevicesAreRefusedWithWhatWouldPass) {
  const Constant weights;
  fourmoe::Options options;
  options.device = "gpu";
  expect_error("argument_invalid", "host nor cuda:0", [&] { fourmoe::Layer::create(weights.desc, options); });
  options.device = "cuda:0";
  options.backend = "cpu";
  expect_error("argument_invalid", "device host", [&] { fourmoe::Layer::create(weights.desc, options); });
  options.device = "host";
  options.backend = "sm90";
  expect_error("argument_invalid", "device cuda:0", [&] { fourmoe::Layer::create(weights.desc, options); });
  options.device = "cuda:77";  // not built, or no such GPU
  try {
    fourmoe::Layer::create(weights.desc, options);
    FAIL() << "accepted";
  } catch (const fourmoe::Error& error) {
    EXPECT_TRUE(error.name() == "not_built" || error.name() == "device_missing") << error.name();
  }
}

TEST(Api, BiasesThatAreNotFiniteAreRefused) {
  Constant weights;
  const std::vector<float> bias = {0.0f, 1.0f, NAN, 0.0f};
  weights.desc.selection_bias = bias.data();
  expect_error("value_not_finite", "selection_bias[2] is nan", [&] { fourmoe::Layer::create(weights.desc); });
}

TEST(Api, NumbersThatAreNotFiniteAreRefused) {
  Constant weights;
  weights.desc.activation = FOURMOE_SWIGLU_CLAMPED;
  weights.desc.alpha = weights.desc.beta = 1.0f;
  weights.desc.limit = INFINITY;  // no limit
  fourmoe::Layer::create(weights.desc);
  for (float fourmoe_layer_desc::*field : {&fourmoe_layer_desc::alpha, &fourmoe_layer_desc::beta,
                                           &fourmoe_layer_desc::limit, &fourmoe_layer_desc::scale}) {
    fourmoe_layer_desc desc = weights.desc;
    desc.*field = NAN;
    expect_error("argument_invalid", " is nan, expected", [&] { fourmoe::Layer::create(desc); });
  }
}

TEST(Api, NegativeSizesAreRefusedWithoutMemoryToo) {
  const Constant weights;
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc);
  Buffers b(3);
  b.call.hidden_states = fourmoe::view(nullptr, FOURMOE_F32, -5, kHidden);
  b.call.topk_ids.data = b.call.topk_weights.data = nullptr;
  expect_error("argument_invalid", "hidden_states is [-5, 32]", [&] { layer.run(b.call); });
}

TEST(Api, NullPointersAreRefused) {
  EXPECT_NE(fourmoe_checkpoint_open(nullptr, nullptr), FOURMOE_OK);
  EXPECT_NE(fourmoe_layer_create(nullptr, nullptr, nullptr), FOURMOE_OK);
  EXPECT_NE(fourmoe_layer_run(nullptr, nullptr, nullptr, 0), FOURMOE_OK);
  EXPECT_NE(fourmoe_layer_wait(nullptr, nullptr), FOURMOE_OK);
  EXPECT_NE(fourmoe_layer_refit(nullptr, nullptr), FOURMOE_OK);
  EXPECT_NE(std::string(fourmoe_last_error()), "");
  fourmoe_layer_free(nullptr);
  fourmoe_checkpoint_close(nullptr);
  EXPECT_STREQ(fourmoe_status_name(12345), "unknown");
  EXPECT_STREQ(fourmoe_version(), "0.1.0");
}

TEST(Api, TheLayersOfACheckpointFitWhatTheCallerHas) {
  fourmoe_checkpoint* checkpoint = nullptr;
  ASSERT_EQ(fourmoe_checkpoint_open(FOURMOE_SOURCE_DIR "/examples/tiny-moe/nvfp4", &checkpoint), FOURMOE_OK);
  std::int32_t layers[4] = {-7, -7, -7, -7};
  std::int64_t count = 0;
  EXPECT_EQ(fourmoe_checkpoint_layers(checkpoint, layers, 2, &count), FOURMOE_OK);
  EXPECT_EQ(count, 4);
  EXPECT_EQ(layers[1], 1);
  EXPECT_EQ(layers[2], -7);
  EXPECT_NE(fourmoe_checkpoint_layers(checkpoint, layers, -1, &count), FOURMOE_OK);
  EXPECT_NE(std::string(fourmoe_last_error()).find("capacity is -1"), std::string::npos) << fourmoe_last_error();
  fourmoe_checkpoint_close(checkpoint);
}

TEST(Api, LoadsTheShippedCheckpoint) {
  const fourmoe::Checkpoint checkpoint(FOURMOE_SOURCE_DIR "/examples/tiny-moe/nvfp4");
  EXPECT_EQ(checkpoint.layers(), (std::vector<std::int32_t>{0, 1, 2, 3}));
  fourmoe::Layer layer = checkpoint.load(2);
  const fourmoe_layer_info info = layer.info();
  EXPECT_EQ(info.hidden, 128);
  EXPECT_EQ(info.inter, 64);
  EXPECT_EQ(info.experts, 32);
  EXPECT_EQ(info.has_router, 1);
  std::vector<float> x(2 * 128, 0.25f), y(2 * 128, NAN);
  fourmoe::Call call;
  call.hidden_states = fourmoe::view(x.data(), FOURMOE_F32, 2, 128);
  call.output = fourmoe::view(y.data(), FOURMOE_F32, 2, 128);
  layer.run(call);
  for (int h = 0; h < 128; ++h) {
    EXPECT_TRUE(std::isfinite(y[h]));
    EXPECT_EQ(y[h], y[128 + h]);
  }
  expect_error("layer_missing", "9", [&] { checkpoint.load(9); });
}

}  // namespace
