// The one launch for few tokens, and the split steps whose GEMMs meet, replayed with changing routing while another
// stream takes multiprocessors away: no call may hang, and none may differ by a bit. FOURMOE_REPLAYS sets how many
// calls a test makes.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <ostream>
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

// What was found wrong: how many words of `numbers`, of what is `none`, of what was `left` where nothing was stored,
// and the first of all.
struct Wrong {
  u32 numbers, none, left;
  u32 call, word, bits, expected;

  bool operator==(const Wrong&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const Wrong& w) {
    return out << w.numbers << " numbers, " << w.none << " that are none, " << w.left << " not stored; first: call "
               << w.call << ", word " << w.word << std::hex << ", 0x" << w.bits << " for 0x" << w.expected << std::dec;
  }
};

// Compares, and leaves nothing that the next call's result could be taken for. The call's number is *turn * calls +
// call.
__global__ void compare(u32* output, const u32* expected, i64 words, Wrong* wrong, const u32* turn, u32 calls,
                        u32 call) {
  for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += gridDim.x * blockDim.x) {
    const u32 word = output[i];
    if (word != expected[i]) {
      const bool none = isnan(__uint_as_float(word));
      atomicAdd(word == kLeft ? &wrong->left : none ? &wrong->none : &wrong->numbers, 1u);
      if (atomicCAS(&wrong->bits, 0u, word == 0 ? 1u : word) == 0) {
        wrong->call = *turn * calls + call, wrong->word = static_cast<u32>(i), wrong->expected = expected[i];
      }
    }
    output[i] = kLeft;
  }
}

__global__ void next(u32* turn) { ++*turn; }

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

struct Replayed {
  i32 tokens;
  Precision precision = Precision::w4a16;  // w4a4: picks have rows of their own
  bool split = false;                      // into steps, of more tiles than there are blocks
};

class Replays : public ::testing::TestWithParam<Replayed> {
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
  spec.problem = GetParam().split ? cases::problem(1024, 512, 64, 8) : cases::problem(512, 128, 64, 8);
  spec.problem.precision = GetParam().precision;
  spec.tokens = GetParam().tokens;
  LayerOptions options;
  options.precision = GetParam().precision;
  options.device = 0;
  options.max_tokens = 64;
  Layer layer(cases::random_layer(spec.problem, 1, true), options);
  const plan::Choice split = {"device.route", "sm90.gemm1", "sm90.gemm2", "device.combine"};
  if (GetParam().split) throw_unless_ok(layer.choose(spec.tokens, split, spec.hidden));
  gpu::OwnStream stream, other;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::OwnStream::make(&other));
  throw_unless_ok(gpu::Buffer::make(gpu::Kind::device, layer.workspace_bytes(), "workspace", &workspace_));
  make_calls(&layer, spec, stream.get());

  DeviceVector<Wrong> wrong(std::vector<Wrong>(1));
  DeviceVector<u32> turn(std::vector<u32>{0});
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(
      stream.get(),
      [&] {
        const auto cuda = static_cast<cudaStream_t>(stream.get());
        for (int i = 0; i < kRoutings; ++i) {
          const Routed& r = calls_[i];
          if (Status status = layer.run(r.mirror->call(), {workspace_.data(), workspace_.bytes()}); !status.ok())
            return status;
          compare<<<4, 256, 0, cuda>>>(output(r), r.expected.data(), bytes(spec) / 4, wrong.data(), turn.data(),
                                       kRoutings, i);
        }
        next<<<1, 1, 0, cuda>>>(turn.data());
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
  EXPECT_EQ(wrong.download()[0], Wrong{});
}

INSTANTIATE_TEST_SUITE_P(Tokens, Replays,
                         ::testing::Values(Replayed{1}, Replayed{2}, Replayed{8}, Replayed{32},
                                           Replayed{1, Precision::w4a4}, Replayed{8, Precision::w4a4},
                                           Replayed{4, Precision::w4a16, true}, Replayed{64, Precision::w4a16, true}));

// Spoils the counters of the next launch's set, in one of `ways` in turn: all tiles are taken, rows of gemm1 never
// come, nor do rows of picks. The word of arrivals says which set that is.
__global__ void spoil(i32* words, gpu::QueueShape shape, const u32* turn, u32 ways) {
  constexpr i32 kMade = 5 * gpu::QueueShape::kLine;
  i32* set = words + gpu::QueueShape::kLine + (words[0] >= 1 << 30 ? shape.set_words() : 0);
  const u32 way = *turn % ways;
  if (way == 0) set[0] = 1 << 20;
  for (i32 hit = 0; way == 1 && hit < 32; ++hit) set[gpu::QueueShape::kHits + hit] = -1000;
  if (way == 2) set[kMade] = -100000;
}

// Counts values that are numbers.
__global__ void count_numbers(const f32* output, i64 values, u32* numbers) {
  for (i64 i = threadIdx.x; i < values; i += blockDim.x) {
    if (!isnan(output[i])) atomicAdd(numbers, 1u);
  }
}

class AbortedReplays : public ::testing::TestWithParam<Replayed> {};

// One launch of a hundred gives up a wait. It is all NaN, and the others are as if it had not been.
TEST_P(AbortedReplays, LeaveTheOthersRight) {
  FOURMOE_NEEDS_HOPPER();
  constexpr int kLaunches = 99;  // of a graph, and the spoilt one; an odd number would always spoil the same set
  std::vector<testing::WholeCall> calls;
  calls.reserve(kRoutings);
  std::vector<DeviceVector<f32>> expected;
  for (int i = 0; i < kRoutings; ++i) {
    testing::WholeCall& call = calls.emplace_back(GetParam().tokens, GetParam().precision);
    cases::Spec spec = call.spec();
    spec.seed = 100 + i;
    spec.routes = static_cast<cases::Routes>(i % 3);  // no holes: a token without picks is zero, whatever is given up
    call.route(spec);
    call.share_work(calls[0]);
    expected.emplace_back(call.run());
  }
  const i64 values = calls[0].output().size();
  DeviceVector<Wrong> wrong(std::vector<Wrong>(1));
  DeviceVector<u32> numbers(std::vector<u32>{0}), turn(std::vector<u32>{0});
  gpu::OwnStream stream, other;
  throw_unless_ok(gpu::OwnStream::make(&stream));
  throw_unless_ok(gpu::OwnStream::make(&other));
  const auto cuda = static_cast<cudaStream_t>(stream.get());
  const auto check = [&](int launch) {
    const int i = launch % kRoutings;
    compare<<<4, 256, 0, cuda>>>(reinterpret_cast<u32*>(calls[i].output().data()),
                                 reinterpret_cast<const u32*>(expected[i].data()), values, wrong.data(), turn.data(),
                                 kLaunches + 1, launch);
  };
  gpu::Graph graph;
  throw_unless_ok(gpu::Graph::capture(
      stream.get(),
      [&] {
        for (int first = 0; first < kLaunches; first += kRoutings) {  // one launch behind another, then their results
          const int end = std::min(first + kRoutings, kLaunches);
          for (int i = first; i < end; ++i) calls[i - first].launch(stream.get());
          for (int i = first; i < end; ++i) check(i);
        }
        const testing::WholeCall& spoilt = calls[kLaunches % kRoutings];
        spoil<<<1, 1, 0, cuda>>>(spoilt.queue().data(), testing::WholeCall::shape(), turn.data(),
                                 GetParam().precision == Precision::w4a4 ? 3 : 2);
        spoilt.launch(stream.get());
        count_numbers<<<1, 256, 0, cuda>>>(spoilt.output().data(), values, numbers.data());
        next<<<1, 1, 0, cuda>>>(turn.data());
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
  EXPECT_EQ(wrong.download()[0], Wrong{});
  EXPECT_EQ(numbers.download()[0], 0u);
  for (int i = 0; i < kRoutings; ++i) {  // a wait of a launch that is not spoilt must not be given up
    EXPECT_EQ(calls[i].fault().reason, i == kLaunches % kRoutings ? Reason::device_failed : Reason::ok) << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, AbortedReplays,
                         ::testing::Values(Replayed{3}, Replayed{12}, Replayed{12, Precision::w4a4}));

}  // namespace
}  // namespace fourmoe
