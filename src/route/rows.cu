// Tokens to the rows of their slots: rounded to bf16 (gather), or to NVFP4 (quantise), or from NVFP4 (decode).
//
// A thread has an octet of a token's columns, reads it once and writes it to each of the token's slots; two threads
// side by side have a block of 16, whose scale they share.
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "route/device.h"
#include "route/octets.cuh"

namespace fourmoe::route {
namespace {

constexpr i32 kThreads = 128;
constexpr i32 kBatch = 8;  // slots looked up together
constexpr u32 kAll = 0xffffffffu;

struct Place {
  i64 row;
  i32 octet;
};

__device__ __forceinline__ Place place(i32 columns) {
  const i32 parts = (columns / 8 + kThreads - 1) / kThreads;
  return {blockIdx.x / parts, static_cast<i32>(blockIdx.x % parts * kThreads + threadIdx.x)};
}

i64 blocks(i64 rows, i32 columns) { return rows * ((columns / 8 + kThreads - 1) / kThreads); }

__device__ __forceinline__ uint4 rounded_octet(const format::Tensor& hidden, const Place& at) {
  if (hidden.dtype == format::Dtype::bf16) return reinterpret_cast<const uint4*>(hidden.row(at.row))[at.octet];
  f32 x[8];
  gpu::load_octet(hidden.row(at.row), hidden.dtype, at.octet, x);
  return gpu::octet_bf16(x);
}

// An octet of bf16 to all slots of its token.
__device__ __forceinline__ void scatter(const DeviceTokens& a, const Place& at, const uint4& x) {
  const Problem& problem = a.problem;
  const i64 octets = problem.hidden / 8;
  uint4* rows = reinterpret_cast<uint4*>(a.rows) + at.octet;
  const i64 pick = at.row * problem.top_k;
  for (i32 p = 0; p < problem.top_k; p += kBatch) {
    i32 slot[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) slot[i] = p + i < problem.top_k ? a.slots.pick_slot[pick + p + i] : -1;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (slot[i] < 0) continue;
      rows[slot[i] * octets] = problem.routing.weight_on_input ? weighted(x, a.slots.weights[pick + p + i]) : x;
    }
  }
}

__global__ void __launch_bounds__(kThreads) gather_tokens(const DeviceTokens a) {
  gpu::begin();
  const Place at = place(a.problem.hidden);
  if (at.octet >= a.problem.hidden / 8) return;
  scatter(a, at, rounded_octet(a.hidden, at));
}

// All blocks of a token look at all its scales, so that all of them leave it; what they write is the same.
__device__ __forceinline__ bool refuse_scales(const DeviceTokens& a, i64 token) {
  if (!has_bad_scale(a.hidden_scales, token, a.fault)) return false;
  if (threadIdx.x < a.problem.top_k) a.slots.pick_slot[token * a.problem.top_k + threadIdx.x] = kRefused;
  return true;
}

__global__ void __launch_bounds__(kThreads) decode_tokens(const DeviceTokens a) {
  gpu::begin();
  const Place at = place(a.problem.hidden);
  if (refuse_scales(a, at.row) || at.octet >= a.problem.hidden / 8) return;
  const u32 codes = reinterpret_cast<const u32*>(a.hidden.row(at.row))[at.octet];
  scatter(a, at, decode_octet(codes, a.hidden_scales.row(at.row)[at.octet / 2]));
}

// Octets of two planes, for f16 layers; the second plane begins after the slots of problem.max_tokens.
__global__ void __launch_bounds__(kThreads) gather_planes(const DeviceTokens a) {
  gpu::begin();
  const Problem& problem = a.problem;
  const Place at = place(problem.hidden);
  const i64 octets = problem.hidden / 8;
  if (at.octet >= octets) return;
  f32 x[8];
  gpu::load_octet(a.hidden.row(at.row), a.hidden.dtype, at.octet, x);
  round_f16(x);
  uint4* rows = reinterpret_cast<uint4*>(a.rows) + at.octet;
  const i64 plane = i64{problem.max_tokens} * problem.top_k * octets;
  for (i64 pick = at.row * problem.top_k; pick < (at.row + 1) * problem.top_k; ++pick) {
    const i32 slot = a.slots.pick_slot[pick];
    if (slot < 0) continue;
    f32 product[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) product[i] = problem.routing.weight_on_input ? x[i] * a.slots.weights[pick] : x[i];
    split(product, &rows[slot * octets], &rows[plane + slot * octets]);
  }
}

// Where a pick goes and how its token is scaled.
struct Target {
  i32 slot = -1;  // negative for nowhere
  f32 global = 0.0f;
};

__device__ __forceinline__ Target target_of(const DeviceTokens& a, i64 pick) {
  const i32 slot = a.slots.pick_slot[pick];
  return {slot, slot < 0 ? 0.0f : a.input_scales[a.slots.ids[pick] - a.problem.first_expert]};
}

// Two picks at a time: of the two threads that share a block each makes the step of one.
__global__ void __launch_bounds__(kThreads) quantise_tokens(const DeviceTokens a) {
  gpu::begin();
  const Problem& problem = a.problem;
  const Place at = place(problem.hidden);
  const i64 octets = problem.hidden / 8, pick = at.row * problem.top_k;
  const bool real = at.octet < octets;
  f32 x[8];
  gpu::load_octet(a.hidden.row(at.row), a.hidden.dtype, real ? at.octet : 0, x);
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  const Target mine = lane < problem.top_k ? target_of(a, pick + lane) : Target{};
  const bool weighs = problem.routing.weight_on_input && __shfl_sync(kAll, mine.slot, 0) >= 0;  // then top_k is 1
  const f32 weight = weighs ? a.slots.weights[pick] : 1.0f;
#pragma unroll
  for (f32& value : x) value *= weight;
  const u32 largest = largest_of(x);
  for (i32 first = 0; first < problem.top_k; first += 2) {
    const f32 global = __shfl_sync(kAll, mine.global, first + lane % 2);
    const Step own = step_of(block_scale(largest, global), global);
#pragma unroll
    for (i32 i = 0; i < 2; ++i) {
      const i32 slot = __shfl_sync(kAll, mine.slot, first + i);
      const Step step{__shfl_sync(kAll, own.step, i, 2), __shfl_sync(kAll, own.scale, i, 2),
                      __shfl_sync(kAll, own.inverse, i, 2)};
      if (slot < 0) continue;
      const uint4 quantised = quantise_octet(x, largest, step);
      if (real) reinterpret_cast<uint4*>(a.rows)[slot * octets + at.octet] = quantised;
    }
  }
}

__device__ __forceinline__ bool in_use(const DeviceRows& a, i64 slot) {
  return slot < a.slots.expert_begin[a.problem.local_experts];
}

__global__ void __launch_bounds__(kThreads) quantise_slots(const DeviceRows a) {
  gpu::begin();
  const Place at = place(a.columns);
  if (!in_use(a, at.row)) return;
  const i64 octets = a.columns / 8;
  const bool real = at.octet < octets;
  const i64 index = at.row * octets + (real ? at.octet : 0);
  f32 x[8];
  gpu::load_octet(a.values, format::Dtype::f32, index, x);
  const f32 global = a.globals[a.slots.ids[a.slots.slot_pick[at.row]] - a.problem.first_expert];
  const u32 largest = largest_of(x);
  const uint4 quantised = quantise_octet(x, largest, step_of(block_scale(largest, global), global));
  if (real) reinterpret_cast<uint4*>(a.rows)[index] = quantised;
}

}  // namespace

Status launch_gather(const DeviceTokens& args, void* stream) {
  if (args.tokens == 0) return {};
  if (Status status = gpu::check_rows("hidden_states", args.hidden); !status.ok()) return status;
  const auto kernel = args.problem.activations == format::Dtype::f16 ? gather_planes : gather_tokens;
  return gpu::launch("gather", kernel, {blocks(args.tokens, args.problem.hidden), kThreads}, args, stream);
}

Status launch_quantise(const DeviceTokens& args, void* stream) {
  if (args.tokens == 0) return {};
  if (Status status = gpu::check_rows("hidden_states", args.hidden); !status.ok()) return status;
  return gpu::launch("quantise", quantise_tokens, {blocks(args.tokens, args.problem.hidden), kThreads}, args, stream);
}

Status launch_decode(const DeviceTokens& args, void* stream) {
  if (args.tokens == 0) return {};
  if (Status status = gpu::check_codes("hidden_states", args.hidden); !status.ok()) return status;
  return gpu::launch("decode", decode_tokens, {blocks(args.tokens, args.problem.hidden), kThreads}, args, stream);
}

Status launch_quantise_rows(const DeviceRows& args, void* stream) {
  const i64 slots = i64{args.tokens} * args.problem.top_k;
  return gpu::launch("quantise_rows", quantise_slots, {blocks(slots, args.columns), kThreads}, args, stream);
}

}  // namespace fourmoe::route
