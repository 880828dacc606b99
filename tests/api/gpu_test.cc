// The public faces on a GPU, as a program with streams and memory of its own sees them.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fourmoe/fourmoe.hpp"

namespace {

constexpr int kHidden = 256, kInter = 128, kExperts = 8, kTopK = 2, kTokens = 33;

bool hopper_here() {
  int count = 0, major = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0 &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess && major == 9;
}

struct Weights {
  explicit Weights(unsigned seed) : codes(kExperts), scales(kExperts) {
    std::mt19937 random(seed);
    for (int e = 0; e < kExperts; ++e) {
      codes[e].resize(kHidden * kInter / 2);
      scales[e].resize(kHidden * kInter / 16);
      for (auto& byte : codes[e]) byte = static_cast<std::uint8_t>(random());
      for (auto& byte : scales[e]) byte = static_cast<std::uint8_t>(0x30 + random() % 16);
      const fourmoe_matrix matrix{codes[e].data(), scales[e].data(), 0, 0, 0.01f, 0};
      fourmoe_expert expert{};
      expert.gate = expert.up = expert.down = matrix;
      experts.push_back(expert);
    }
    desc.struct_size = sizeof desc;
    desc.hidden = kHidden;
    desc.inter = kInter;
    desc.experts = kExperts;
    desc.top_k = kTopK;
    desc.renormalise = 1;
    desc.expert_table = experts.data();
  }
  std::vector<std::vector<std::uint8_t>> codes, scales;
  std::vector<fourmoe_expert> experts;
  fourmoe_layer_desc desc{};
};

template <class T>
T* upload(const std::vector<T>& values) {
  T* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, values.size() * sizeof(T)), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  return memory;
}

// One call's tensors, on the host and on the device.
struct Tensors {
  Tensors() : x(kTokens * kHidden), y(kTokens * kHidden, NAN), ids(kTokens * kTopK), w(kTokens * kTopK, 0.5f) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (float& value : x) value = normal(random);
    for (auto& id : ids) id = static_cast<std::int32_t>(random() % kExperts);
    device_x = upload(x), device_y = upload(y), device_ids = upload(ids), device_w = upload(w);
  }
  ~Tensors() {
    for (void* memory : {(void*)device_x, (void*)device_y, (void*)device_ids, (void*)device_w}) cudaFree(memory);
  }
  fourmoe::Call call(bool device) {
    fourmoe::Call c;
    c.hidden_states = fourmoe::view(device ? device_x : x.data(), FOURMOE_F32, kTokens, kHidden);
    c.topk_ids = fourmoe::view(device ? device_ids : ids.data(), FOURMOE_I32, kTokens, kTopK);
    c.topk_weights = fourmoe::view(device ? device_w : w.data(), FOURMOE_F32, kTokens, kTopK);
    c.output = fourmoe::view(device ? device_y : y.data(), FOURMOE_F32, kTokens, kHidden);
    return c;
  }
  std::vector<float> result() const {
    std::vector<float> values(y.size());
    EXPECT_EQ(cudaMemcpy(values.data(), device_y, values.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }
  std::vector<float> x, y;
  std::vector<std::int32_t> ids;
  std::vector<float> w;
  float *device_x, *device_y, *device_w;
  std::int32_t* device_ids;
};

double rel_l2(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) difference += (a[i] - b[i]) * (a[i] - b[i]), norm += b[i] * b[i];
  return std::sqrt(difference / norm);
}

TEST(GpuApi, AgreesWithTheHostOnAStreamOfTheCaller) {
  if (!hopper_here()) GTEST_SKIP() << "needs a GPU of compute capability 9.0 as cuda:0";
  const Weights weights(1), other(2);
  fourmoe::Options options;
  fourmoe::Layer host = fourmoe::Layer::create(weights.desc, options);
  options.device = "cuda:0";
  fourmoe::Layer device = fourmoe::Layer::create(weights.desc, options);
  EXPECT_EQ(device.info().device, 0);
  Tensors t;
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  host.run(t.call(false));
  fourmoe::Call call = t.call(true);
  call.stream = stream;
  device.run(call);
  device.wait(stream);
  EXPECT_LE(rel_l2(t.result(), t.y), 2e-4);

  host.refit(other.desc);
  device.refit(other.desc);
  host.run(t.call(false));
  EXPECT_GT(rel_l2(t.result(), t.y), 0.1);  // of the weights before
  device.run(call);
  device.wait(stream);
  EXPECT_LE(rel_l2(t.result(), t.y), 2e-4);
  cudaStreamDestroy(stream);
}

// The same weights, some of the codes and of the scales in the GPU's memory, and biases there.
struct DeviceWeights {
  explicit DeviceWeights(const Weights& weights) : experts(weights.experts), desc(weights.desc) {
    const std::vector<float> values(kHidden, 0.25f);
    for (int e = 0; e < kExperts; ++e) {
      fourmoe_matrix* matrices[] = {&experts[e].gate, &experts[e].up, &experts[e].down};
      for (int m = 0; m < 3; ++m) {
        if ((e + m) % 2 == 0) matrices[m]->data = put(weights.codes[e]);
        if ((e + m) % 4 != 0) matrices[m]->scales = put(weights.scales[e]);
      }
      experts[e].down_bias = put(values);
    }
    desc.expert_table = experts.data();
  }
  ~DeviceWeights() { destroy(); }
  void destroy() {
    for (auto [memory, bytes] : all) cudaMemset(memory, 0xff, bytes), cudaFree(memory);
    all.clear();
  }
  template <class T>
  T* put(const std::vector<T>& values) {
    T* memory = upload(values);
    all.emplace_back(memory, values.size() * sizeof(T));
    return memory;
  }
  std::vector<std::pair<void*, std::size_t>> all;
  std::vector<fourmoe_expert> experts;
  fourmoe_layer_desc desc;
};

TEST(GpuApi, WeightsOfTheGpusMemoryMayBeFreed) {
  if (!hopper_here()) GTEST_SKIP() << "needs a GPU of compute capability 9.0 as cuda:0";
  Weights weights(1), other(2);
  const std::vector<float> bias(kHidden, 0.25f);
  for (Weights* one : {&weights, &other}) {
    for (fourmoe_expert& expert : one->experts) expert.down_bias = bias.data();
  }
  fourmoe::Options options;
  options.device = "cuda:0";
  Tensors t;
  const auto result = [&](fourmoe::Layer* layer) {
    layer->run(t.call(true));
    layer->wait();
    return t.result();
  };
  fourmoe::Layer host = fourmoe::Layer::create(weights.desc, options);
  DeviceWeights first(weights);
  fourmoe::Layer device = fourmoe::Layer::create(first.desc, options);
  first.destroy();
  EXPECT_EQ(device.info().weight_bytes, host.info().weight_bytes);
  EXPECT_EQ(result(&device), result(&host));

  host.refit(other.desc);
  DeviceWeights second(other);
  device.refit(second.desc);
  second.destroy();
  EXPECT_EQ(result(&device), result(&host));

  Weights bad(3);
  bad.scales[5][7 * kHidden / 16 + 2] = 0xff;  // all of this expert's scales are the GPU's
  const DeviceWeights third(bad);
  try {
    device.refit(third.desc);
    FAIL() << "accepted";
  } catch (const fourmoe::Error& error) {
    EXPECT_EQ(error.name(), "scale_invalid");
    EXPECT_STREQ(error.what(), "gate_scale, expert 5, has 0xff at [7, 2]: NaN or negative");
  }
  EXPECT_EQ(result(&device), result(&host));
}

TEST(GpuApi, RefusesHostMemoryAndReportsFaults) {
  if (!hopper_here()) GTEST_SKIP() << "needs a GPU of compute capability 9.0 as cuda:0";
  const Weights weights(1);
  fourmoe::Options options;
  options.device = "cuda:0";
  fourmoe::Layer layer = fourmoe::Layer::create(weights.desc, options);
  Tensors t;
  try {
    layer.run(t.call(false));
    FAIL() << "accepted";
  } catch (const fourmoe::Error& error) {
    EXPECT_EQ(error.name(), "memory_misplaced") << error.what();
  }
  const std::int32_t bad = kExperts;
  ASSERT_EQ(cudaMemcpy(t.device_ids + 5, &bad, 4, cudaMemcpyHostToDevice), cudaSuccess);
  layer.run(t.call(true));
  try {
    layer.wait();
    FAIL() << "accepted";
  } catch (const fourmoe::Error& error) {
    EXPECT_EQ(error.name(), "pick_out_of_range") << error.what();
    EXPECT_NE(std::string(error.what()).find("topk_ids[2, 1] is 8"), std::string::npos) << error.what();
  }
}

}  // namespace
