// Tokens to the rows of their slots: rounded to bf16 (gather), or to NVFP4 (quantise).
//
// A thread has an octet of a token's columns, reads it once and writes it to each of the token's slots; two threads
// side by side have a block of 16, whose scale they share.
#include "format/quantise.h"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::route {
namespace {

constexpr i32 kThreads = 128;
constexpr i32 kBatch = 8;  // slots looked up together

struct Place {
  i64 row;
  i32 octet;
};

__device__ __forceinline__ Place place(i32 columns) {
  const i32 parts = (columns / 8 + kThreads - 1) / kThreads;
  return {blockIdx.x / parts, static_cast<i32>(blockIdx.x % parts * kThreads + threadIdx.x)};
}

i64 blocks(i64 rows, i32 columns) { return rows * ((columns / 8 + kThreads - 1) / kThreads); }

// x rounded to bf16, times the weight, rounded again.
__device__ __forceinline__ uint4 weighted(const uint4& x, f32 weight) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  f32 product[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    product[2 * i] = gpu::low_bf16(words[i]) * weight;
    product[2 * i + 1] = gpu::high_bf16(words[i]) * weight;
  }
  return gpu::octet_bf16(product);
}

__device__ __forceinline__ uint4 rounded_octet(const format::Tensor& hidden, const Place& at) {
  if (hidden.dtype == format::Dtype::bf16) return reinterpret_cast<const uint4*>(hidden.row(at.row))[at.octet];
  f32 x[8];
  gpu::load_octet(hidden.row(at.row), hidden.dtype, at.octet, x);
  return gpu::octet_bf16(x);
}

__global__ void __launch_bounds__(kThreads) gather_tokens(const DeviceTokens a) {
  gpu::begin();
  const Problem& problem = a.problem;
  const Place at = place(problem.hidden);
  const i64 octets = problem.hidden / 8;
  if (at.octet >= octets) return;
  const uint4 x = rounded_octet(a.hidden, at);
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

struct Codes {
  u32 codes;  // eight, the first in the low nibble
  u8 scale;   // of the block that two lanes share
};

// Magnitudes are ordered like their bits, and a NaN's are the largest. All lanes call it.
__device__ __forceinline__ Codes quantise_octet(const f32 (&x)[8], f32 global) {
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffffu);
  largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  Codes out = {0, format::block_scale(__uint_as_float(largest), global)};
  const f32 step = format::from_e4m3(out.scale) * global;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.codes |= u32{format::to_e2m1(x[i] / step)} << 4 * i;
  return out;
}

__device__ __forceinline__ uint4 decode_octet(const Codes& q) {
  const f32 scale = format::from_e4m3(q.scale);
  f32 x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = gpu::from_e2m1(q.codes >> 4 * i) * scale;
  return gpu::octet_bf16(x);
}

// [rows, columns] codes, scales and decoded values, of which octet `index` is written.
struct Quantised {
  u8* codes;
  u8* scales;
  u16* rows;  // may be null
};

__device__ __forceinline__ void store(const Quantised& to, i64 index, const Codes& q) {
  reinterpret_cast<u32*>(to.codes)[index] = q.codes;
  if (index % 2 == 0) to.scales[index / 2] = q.scale;
  if (to.rows != nullptr) reinterpret_cast<uint4*>(to.rows)[index] = decode_octet(q);
}

__global__ void __launch_bounds__(kThreads) quantise_tokens(const DeviceTokens a) {
  gpu::begin();
  const Problem& problem = a.problem;
  const Place at = place(problem.hidden);
  const i64 octets = problem.hidden / 8;
  const bool real = at.octet < octets;
  f32 token[8];
  gpu::load_octet(a.hidden.row(at.row), a.hidden.dtype, real ? at.octet : 0, token);
  for (i64 pick = at.row * problem.top_k; pick < (at.row + 1) * problem.top_k; ++pick) {
    const i32 slot = a.slots.pick_slot[pick];
    if (slot < 0) continue;
    const f32 weight = problem.routing.weight_on_input ? a.slots.weights[pick] : 1.0f;
    f32 x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = token[i] * weight;
    const Codes q = quantise_octet(x, a.input_scales[a.slots.ids[pick] - problem.first_expert]);
    if (real) store({a.slots.codes, a.slots.scales, a.rows}, slot * octets + at.octet, q);
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
  const i32 expert = a.slots.ids[a.slots.slot_pick[at.row]] - a.problem.first_expert;
  const Codes q = quantise_octet(x, a.globals[expert]);
  if (real) store({a.codes, a.scales, a.rows}, index, q);
}

__global__ void __launch_bounds__(kThreads) dequantise_slots(const DeviceRows a) {
  gpu::begin();
  const Place at = place(a.columns);
  const i64 octets = a.columns / 8;
  if (!in_use(a, at.row) || at.octet >= octets) return;
  const i64 index = at.row * octets + at.octet;
  const Codes q = {reinterpret_cast<const u32*>(a.codes)[index], a.scales[index / 2]};
  reinterpret_cast<uint4*>(a.rows)[index] = decode_octet(q);
}

Status launch_rows(const char* name, void (*kernel)(DeviceRows), const DeviceRows& args, void* stream) {
  const i64 slots = i64{args.tokens} * args.problem.top_k;
  return gpu::launch(name, kernel, {blocks(slots, args.columns), kThreads}, args, stream);
}

}  // namespace

Status launch_gather(const DeviceTokens& args, void* stream) {
  if (args.tokens == 0) return {};
  if (Status status = gpu::check_rows("hidden_states", args.hidden); !status.ok()) return status;
  if (args.problem.activations != format::Dtype::bf16 || args.hidden.dtype == format::Dtype::f16) {
    return refuse(Reason::dtype_unsupported, "slots of f16 tokens are not gathered on a device, bf16 are");
  }
  return gpu::launch("gather", gather_tokens, {blocks(args.tokens, args.problem.hidden), kThreads}, args, stream);
}

Status launch_quantise(const DeviceTokens& args, void* stream) {
  if (args.tokens == 0) return {};
  if (Status status = gpu::check_rows("hidden_states", args.hidden); !status.ok()) return status;
  return gpu::launch("quantise", quantise_tokens, {blocks(args.tokens, args.problem.hidden), kThreads}, args, stream);
}

Status launch_quantise_rows(const DeviceRows& args, void* stream) {
  return launch_rows("quantise_rows", quantise_slots, args, stream);
}

Status launch_dequantise_rows(const DeviceRows& args, void* stream) {
  return launch_rows("dequantise_rows", dequantise_slots, args, stream);
}

}  // namespace fourmoe::route
