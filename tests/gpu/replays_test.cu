// The one launch for few tokens, replayed with changing routing while another stream takes multiprocessors away: no
// call may hang, and none may differ by a bit. FOURMOE_REPLAYS sets how many calls a test makes.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "case.h"
#include "gpu/runtime.h"
#include "hopper.h"
#include "layer.h"
#include "memory.h"
#include "mirror.h"
#include "whole_call.h"

namespace fourmoe {
namespace {

using testing::DeviceVector;
using testing::require;

constexpr int kRoutings = 16;
constexpr i64 kWords = 64 * 1024;  // most of an output

i64 replays() {
  const char* given = std::getenv("FOURMOE_REPLAYS");
  return given == nullptr ? 8000 : std::max<i64>(std::atoll(given), kRoutings);
}

// What is left of an output where a call stores nothing: not a number, and none that a kernel makes.
constexpr u32 kLeft = 0x7fc0dead;

// Counts words in which `output` and `expected` differ: different[0] numbers, [1] what is none, [2] what was not
// stored. The next call finds nothing that could be taken for its result.
__global__ void compare(u32* output, const u32* expected, i64 words, u32* different) {
  for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
    const u32 word = output[i];
    if (word != expected[i]) atomicAdd(&different[word == kLeft ? 2 : isnan(__uint_as_float(word)) ? 1 : 0], 1u);
    output[i] = kLeft;
  }
}
const std::vector<u32> kNoneDiffer = {0, 0, 0};

// Holds its multiprocessors: a block that leaves no room beside it.
__global__ void hold(i64 cycles) {
  extern __shared__ u8 room[];
  if (cycles < 0) room[0] = 1;
  for (const i64 begin = clock64(); clock64() - begin < cycles;) {
  }
}

// A call's tensors in device memory, and what it should give.
struct Routed {
  std::unique_ptr<cases::Call> data;
  std::vector<u8> output;
  std::unique_ptr<cases::Mirror> mirror;
  DeviceVector<u32> expected{kWords};
};

class Replays : public ::testing::TestWithParam<i32> {
 protected:
  // One call of every routing, of which the results are kept.
  void make_calls(Layer* layer, cases::Spec spec, void* stream) {
    for (int i = 0; i < kRoutings; ++i) {
      spec.seed = 100 + i;
      spec.routes = static_cast<cases::Routes>(i % 4);
      Routed& routed = calls_.emplace_back();
      routed.data = std::make_unique<cases::Call>(spec);
      routed.mirror = std::make_unique<cases::Mirror>(*layer, routed.data->view(&routed.output, format::Dtype::f32));
      routed.mirror->call().stream = stream;
      throw_unless_ok(layer->run(routed.mirror->call(), {workspace_.data(), workspace_.bytes()}));
      throw_unless_ok(layer->wait(stream));
      require(cudaMemcpy(routed.expected.data(), output(routed), bytes(spec), cudaMemcpyDeviceToDevice), "keep");
    }
  }
  static u32* output(const Routed& r) { return reinterpret_cast<u32*>(r.mirror->call().output.data); }
  static i64 bytes(const cases::Spec& spec) { return i64{spec.tokens} * spec.problem.hidden * 4; }

  std::vector<Routed> calls_;
  gpu::Buffer workspace_;
};

TEST_P(Replays, NeitherHangNorDiffer) {
  FOURMOE_NEEDS_HOPPER();
  cases::Spec spec;
  spec.problem = cases::problem(512, 128, 64, 8);
  spec.tokens = GetParam();
  LayerOptions options;
  options.device = 0;
  options.max_tokens = 32;
  Layer layer(cases::random_layer(spec.problem, 1, true), options);
  gpu::OwnStream stream, other;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::OwnStream::make(&other));
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, layer.workspace_bytes(), "workspace", &workspace_));
  make_calls(&layer, spec, stream.get());

  DeviceVector<u32> different(kNoneDiffer);
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(
      stream.get(),
      [&] {
        for (const Routed& r : calls_) {
          if (Status status = layer.run(r.mirror->call(), {workspace_.data(), workspace_.bytes()}); !status.ok())
            return status;
          compare<<<4, 256, 0, static_cast<cudaStream_t>(stream.get())>>>(output(r), r.expected.data(), bytes(spec) / 4,
                                                                          different.data());
        }
        return Status{};
      },
      &graph));
  require(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10), "room");
  for (i64 round = 0; round < replays() / kRoutings; ++round) {
    throw_unless_ok(graph.launch(stream.get()));
    const int blocks = 1 + static_cast<int>(round * 37 % 131);
    hold<<<blocks, 32, 200 << 10, static_cast<cudaStream_t>(other.get())>>>(20'000 + round % 7 * 30'000);
    if (round % 64 == 63) require(cudaStreamSynchronize(static_cast<cudaStream_t>(other.get())), "hold");
  }
  throw_unless_ok(layer.wait(stream.get()));
  require(cudaDeviceSynchronize(), "replays");
  EXPECT_EQ(different.download(), kNoneDiffer);
}

INSTANTIATE_TEST_SUITE_P(Tokens, Replays, ::testing::Values(1, 2, 8, 32));

// Spoils the counters of the next launch's set: in turn all tiles are taken, or rows of gemm1 never come. The word of
// arrivals says which set that is.
__global__ void spoil(i32* words, gpu::QueueShape shape, u32* turn) {
  i32* set = words + gpu::QueueShape::kLine + (words[0] >= 1 << 30 ? shape.set_words() : 0);
  if (*turn % 2 == 0) set[0] = 1 << 20;
  for (i32 hit = 0; *turn % 2 != 0 && hit < 32; ++hit) set[gpu::QueueShape::kHits + hit] = -1000;
  ++*turn;
}

// Counts values that are numbers.
__global__ void count_numbers(const f32* output, i64 values, u32* numbers) {
  for (i64 i = threadIdx.x; i < values; i += blockDim.x) {
    if (!isnan(output[i])) atomicAdd(numbers, 1u);
  }
}

class AbortedReplays : public ::testing::TestWithParam<i32> {};

// One launch of a hundred gives up a wait. It is all NaN, and the others are as if it had not been.
TEST_P(AbortedReplays, LeaveTheOthersRight) {
  FOURMOE_NEEDS_HOPPER();
  constexpr int kLaunches = 99;  // of a graph, and the spoilt one; an odd number would always spoil the same set
  std::vector<testing::WholeCall> calls;
  calls.reserve(kRoutings);
  std::vector<DeviceVector<f32>> expected;
  for (int i = 0; i < kRoutings; ++i) {
    testing::WholeCall& call = calls.emplace_back(GetParam());
    cases::Spec spec = call.spec();
    spec.seed = 100 + i;
    spec.routes = static_cast<cases::Routes>(i % 3);  // no holes: a token without picks is zero, whatever is given up
    call.route(spec);
    expected.emplace_back(call.run());
  }
  const i64 values = calls[0].output().size();
  DeviceVector<u32> different(kNoneDiffer), numbers(std::vector<u32>{0}), turn(std::vector<u32>{0});
  gpu::OwnStream stream, other;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::OwnStream::make(&other));
  const auto cuda = static_cast<cudaStream_t>(stream.get());
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(
      stream.get(),
      [&] {
        for (int i = 0; i <= kLaunches; ++i) {
          const testing::WholeCall& call = calls[i % kRoutings];
          if (i == kLaunches) spoil<<<1, 1, 0, cuda>>>(call.queue().data(), call.shape(), turn.data());
          call.launch(stream.get());
          if (i == kLaunches) count_numbers<<<1, 256, 0, cuda>>>(call.output().data(), values, numbers.data());
          else
            compare<<<4, 256, 0, cuda>>>(reinterpret_cast<u32*>(call.output().data()),
                                         reinterpret_cast<const u32*>(expected[i % kRoutings].data()), values,
                                         different.data());
        }
        return Status{};
      },
      &graph));
  require(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10), "room");
  for (i64 round = 0; round < std::max<i64>(replays() / (kLaunches + 1), 4); ++round) {
    throw_unless_ok(graph.launch(stream.get()));
    const int blocks = 1 + static_cast<int>(round * 37 % 131);
    hold<<<blocks, 32, 200 << 10, static_cast<cudaStream_t>(other.get())>>>(20'000 + round % 7 * 30'000);
    require(cudaStreamSynchronize(static_cast<cudaStream_t>(other.get())), "hold");
  }
  require(cudaDeviceSynchronize(), "replays");
  EXPECT_EQ(different.download(), kNoneDiffer);
  EXPECT_EQ(numbers.download()[0], 0u);
  for (int i = 0; i < kRoutings; ++i) {  // a wait of a launch that is not spoilt must not be given up
    EXPECT_EQ(calls[i].fault().reason, i == kLaunches % kRoutings ? Reason::device_failed : Reason::ok) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, AbortedReplays, ::testing::Values(3, 12));

}  // namespace
}  // namespace fourmoe
