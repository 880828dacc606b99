#include "backends/sm90/whole_launch.cuh"
#include "gpu/rows.h"
#include "gpu/runtime.h"
#include "route/octets.cuh"

namespace fourmoe::sm90 {
namespace {

struct Rounding {
  format::Tensor hidden;
  u16* rows;  // [hidden.rows, hidden.cols] bf16, then the same of the second plane
  bool two;   // planes, of f16
};

__global__ void __launch_bounds__(256) round_tokens(const __grid_constant__ Rounding a) {
  gpu::begin();
  const i32 octets = static_cast<i32>(a.hidden.cols / 8);
  const i32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= a.hidden.rows * octets) return;
  f32 x[8];
  gpu::load_octet(a.hidden.row(i / octets), a.hidden.dtype, i % octets, x);
  uint4* rows = reinterpret_cast<uint4*>(a.rows);
  if (a.two) route::split(x, &rows[i], &rows[a.hidden.rows * octets + i]);
  else rows[i] = gpu::octet_bf16(x);
}

Status launch_round(const Whole& call, void* stream) {
  const i64 octets = call.hidden.rows * call.hidden.cols / 8;
  return gpu::launch("round", round_tokens, {(octets + 255) / 256, 256},
                     Rounding{call.hidden, call.work.rows, form_of(call.slots.problem).planes == 2}, stream);
}

struct Decoding {
  format::Tensor codes;   // [tokens, hidden/2] u8
  format::Tensor scales;  // [tokens, hidden/16] u8 E4M3
  u16* rows;              // [tokens, hidden] bf16, overwritten but for tokens that are refused
  u8* refused;            // [tokens], overwritten
  gpu::Fault* fault;
};

// A block a token.
__global__ void __launch_bounds__(256) decode_tokens(const __grid_constant__ Decoding a) {
  gpu::begin();
  const i64 token = blockIdx.x, octets = a.codes.cols / 4;
  const bool bad = route::has_bad_scale(a.scales, token, a.fault);
  if (threadIdx.x == 0) a.refused[token] = bad ? 1 : 0;
  const u32* codes = reinterpret_cast<const u32*>(a.codes.row(token));
  uint4* row = reinterpret_cast<uint4*>(a.rows) + token * octets;
  for (i64 i = threadIdx.x; !bad && i < octets; i += blockDim.x) {
    row[i] = route::decode_octet(codes[i], a.scales.row(token)[i / 2]);
  }
}

Status launch_decode(const Whole& call, void* stream) {
  return gpu::launch("decode", decode_tokens, {call.slots.tokens, 256},
                     Decoding{call.hidden, call.hidden_scales, call.work.rows, call.work.refused, call.slots.fault},
                     stream);
}

}  // namespace

Status launch(const Whole& call, i32 multiprocessors, void* stream) {
  if (call.slots.tokens == 0) return {};
  const Rows rows = rows_of(call);
  Status status = rows == Rows::decoded ? gpu::check_codes("hidden_states", call.hidden)
                                        : gpu::check_rows("hidden_states", call.hidden);
  if (status.ok()) status = gpu::check_rows("output", call.sum.out.output);
  if (status.ok() && rows == Rows::rounded) status = launch_round(call, stream);
  if (status.ok() && rows == Rows::decoded) status = launch_decode(call, stream);
  const Problem& problem = call.slots.problem;
  if (status.ok() && call.clears) {
    status = gpu::fill(call.work.queue, 0, 4 * i64{queue_shape(multiprocessors).words()}, stream);
  }
  if (!status.ok()) return status;
  const int tile = call.tile >= 0 ? call.tile : choose_whole(load_of(problem, call.slots.tokens), multiprocessors);
  if (has_pick_rows(problem)) return launch_by_pick(tile, call, multiprocessors, stream);
  return launch_shape<false>(tile, call, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
