#include <algorithm>

#include "backends/sm90/whole.cuh"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/runtime.h"

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
  if (!a.two) {
    rows[i] = gpu::octet_bf16(x);
    return;
  }
  gpu::Planes pair[4];
  for (int j = 0; j < 4; ++j) pair[j] = gpu::planes_of_f16(x[2 * j], x[2 * j + 1]);
  rows[i] = {pair[0].high, pair[1].high, pair[2].high, pair[3].high};
  rows[a.hidden.rows * octets + i] = {pair[0].low, pair[1].low, pair[2].low, pair[3].low};
}

Status launch_round(const Whole& call, void* stream) {
  const i64 octets = call.hidden.rows * call.hidden.cols / 8;
  return gpu::launch("round", round_tokens, {(octets + 255) / 256, 256},
                     Rounding{call.hidden, call.work.rows, form_of(call.slots.problem).planes == 2}, stream);
}

template <class T, bool kSingle>
Status launch_layer(const Whole& call, i32 multiprocessors, void* stream) {
  const Problem& problem = call.slots.problem;
  const weights::DeviceTable& table = *call.table;
  if (T::kSplit && call.slots.tokens > kHitTokens) {
    return refuse(Reason::internal, "tiles that split K take up to " + std::to_string(kHitTokens) + " tokens");
  }
  const i32 rows1 = problem.activation.gated() ? 2 * problem.inter : problem.inter;
  const i32 entries = problem.local_experts + (call.shared ? 1 : 0);
  Layer<T, kSingle> job{};
  job.gemms[0] = Operands{table.gemm1, entries, row_tiles(rows1), k_steps(problem.hidden)};
  job.gemms[1] = Operands{table.gemm2, entries, row_tiles(problem.hidden), k_steps(problem.inter)};
  const i32 rows_of_y = kSingle ? problem.top_k + 1 : most_hits(problem) * kHitTokens;  // of a plane
  job.gemms[0].plane = call.slots.tokens;
  job.gemms[1].plane = rows_of_y;
  job.activate = {table.gemm1_globals, table.gate_bias, table.up_bias, problem.activation,
                  call.work.y,         nullptr,         problem.inter, i64{rows_of_y} * problem.inter};
  job.project = {table.gemm2_globals, table.down_bias, call.work.z, problem.hidden};
  job.slots = call.slots;
  job.screened = call.slots.in.logits.data == nullptr || route::can_screen(call.slots);
  while (!job.screened && ((2 * call.slots.tokens) << job.team_shift) <= Layer<T, kSingle>::kPickers) ++job.team_shift;
  job.teams = std::min(Layer<T, kSingle>::kPickers >> job.team_shift,
                       Layer<T, kSingle>::kPickBytes / (8 * route::team_words(problem)));
  job.shared_expert = call.shared;
  job.queue = {queue_shape(multiprocessors), call.work.queue};
  job.wait_cycles = call.wait_cycles;
  job.sum = call.sum;
  job.sum.rows = call.work.z;
  if (call.shared) job.sum.addend.addend = call.work.z + i64{call.slots.tokens} * problem.top_k * problem.hidden;
  const bool rounded = call.hidden.dtype == format::Dtype::bf16;
  const u16* tokens = rounded ? reinterpret_cast<const u16*>(call.hidden.data) : call.work.rows;
  const i64 stride = rounded && call.slots.tokens > 1 ? call.hidden.stride : problem.hidden;  // one row's is nobody's
  const gpu::MappedRows of_tokens{tokens, i64{T::kPlanes} * call.slots.tokens, problem.hidden, stride};
  Status status = gpu::map_rows(of_tokens, kHitTokens, &job.maps[0]);
  if (status.ok() && !kSingle) {
    const gpu::MappedRows of_y{call.work.y, i64{T::kPlanes} * rows_of_y, problem.inter, problem.inter};
    status = gpu::map_rows(of_y, kHitTokens, &job.maps[1]);
  }
  if (status.ok() && call.slots.tokens > kHitTokens) status = gpu::map_rows(of_tokens, 1, &job.maps[2]);
  if (!status.ok()) return status;
  const gpu::LaunchShape shape{multiprocessors, T::kThreads, shared_bytes<T, Layer<T, kSingle>>(), true};
  return gpu::launch(multiply_tiles<T, Layer<T, kSingle>>, shape, stream, job);
}

template <class T>
Status launch_tokens(const Whole& call, i32 multiprocessors, void* stream) {
  if (call.slots.tokens == 1) return launch_layer<T, true>(call, multiprocessors, stream);
  return launch_layer<T, false>(call, multiprocessors, stream);
}

template <int kTile = kWholeTile>
Status launch_shape(int tile, const Whole& call, i32 multiprocessors, void* stream) {
  if constexpr (kTile < kAllTileShapes) {
    if (tile != kTile) return launch_shape<kTile + 1>(tile, call, multiprocessors, stream);
    const bool powers = call.slots.problem.encoding == format::Encoding::mxfp4;
    return powers ? launch_tokens<Tiles<kTile, true>>(call, multiprocessors, stream)
                  : launch_tokens<Tiles<kTile>>(call, multiprocessors, stream);
  } else {
    return refuse(Reason::internal, "no tile " + std::to_string(tile));
  }
}

}  // namespace

Status launch(const Whole& call, i32 multiprocessors, void* stream) {
  if (call.slots.tokens == 0) return {};
  Status status = gpu::check_rows("hidden_states", call.hidden);
  if (status.ok()) status = gpu::check_rows("output", call.sum.out.output);
  if (status.ok() && call.hidden.dtype != format::Dtype::bf16) status = launch_round(call, stream);
  const Problem& problem = call.slots.problem;
  if (status.ok() && call.clears) {
    status = gpu::fill(call.work.queue, 0, 4 * i64{queue_shape(multiprocessors).words()}, stream);
  }
  if (!status.ok()) return status;
  const int tile = call.tile >= 0 ? call.tile : choose_whole(load_of(problem, call.slots.tokens), multiprocessors);
  return launch_shape(tile, call, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
