// The one launch's templates, for the files that instantiate them: whole.cu, and whole_picks.cu for picks that want
// rows of their own, so that each compiles in a minute or two.
#pragma once

#include <algorithm>
#include <string>

#include "backends/sm90/whole.cuh"
#include "gpu/launch.cuh"

namespace fourmoe::sm90 {

// How gemm1 gets its tokens.
enum class Rows { taken, rounded, decoded, by_pick };  // as they come; by a launch before; likewise; in the launch

inline Rows rows_of(const Whole& call) {
  if (!call.hidden_scales.empty()) return Rows::decoded;
  if (has_pick_rows(call.slots.problem)) return Rows::by_pick;
  return call.hidden.dtype == format::Dtype::bf16 ? Rows::taken : Rows::rounded;
}

template <class T, bool kSingle, bool kByPick>
Status launch_layer(const Whole& call, i32 multiprocessors, void* stream) {
  using Job = Layer<T, kSingle, kByPick>;
  const Problem& problem = call.slots.problem;
  const weights::DeviceTable& table = *call.table;
  if (T::kSplit && call.slots.tokens > kHitTokens) {
    return refuse(Reason::internal, "tiles that split K take up to " + std::to_string(kHitTokens) + " tokens");
  }
  const i32 rows1 = problem.activation.gated() ? 2 * problem.inter : problem.inter;
  const i32 entries = problem.local_experts + (call.shared ? 1 : 0);
  Job job{};
  job.gemms[0] = Operands{table.gemm1, entries, row_tiles(rows1), k_steps(problem.hidden)};
  job.gemms[1] = Operands{table.gemm2, entries, row_tiles(problem.hidden), k_steps(problem.inter)};
  const i32 rows_of_y = kSingle ? problem.top_k + 1 : most_hits(problem) * kHitTokens;  // of a plane
  const Rows rows = rows_of(call);
  const i32 rows_of_x = rows == Rows::by_pick ? most_hits(problem) * kHitTokens : call.slots.tokens;  // of a plane
  job.gemms[0].plane = rows_of_x;
  job.gemms[1].plane = rows_of_y;
  job.activate = {table.gemm1_globals, table.gate_bias, table.up_bias, problem.activation,
                  call.work.y,         nullptr,         problem.inter, i64{rows_of_y} * problem.inter};
  job.project = {table.gemm2_globals, table.down_bias, call.work.z, problem.hidden};
  job.slots = call.slots;
  if (rows == Rows::decoded) job.refused = call.work.refused;
  if (rows == Rows::by_pick) {
    const bool quantises = problem.precision == Precision::w4a4;
    job.pick_rows = {call.hidden, quantises ? table.input_scale : nullptr, call.work.rows,
                     i64{rows_of_x} * problem.hidden};
  }
  if (problem.precision == Precision::w4a4) job.inter_scales = table.inter_scale;
  job.screened = call.slots.in.logits.data == nullptr || route::can_screen(call.slots);
  while (!job.screened && ((2 * call.slots.tokens) << job.team_shift) <= Job::kPickers) ++job.team_shift;
  job.teams = std::min(Job::kPickers >> job.team_shift, Job::kPickBytes / (8 * route::team_words(problem)));
  job.shared_expert = call.shared;
  job.queue = {queue_shape(multiprocessors), call.work.queue};
  job.wait_cycles = call.wait_cycles;
  job.sum = call.sum;
  job.sum.rows = call.work.z;
  if (call.shared) job.sum.addend.addend = call.work.z + i64{call.slots.tokens} * problem.top_k * problem.hidden;
  const u16* tokens = rows == Rows::taken ? reinterpret_cast<const u16*>(call.hidden.data) : call.work.rows;
  const bool strided = rows == Rows::taken && call.slots.tokens > 1;  // one row's stride is nobody's
  const gpu::MappedRows of_tokens{tokens, i64{T::kPlanes} * rows_of_x, problem.hidden,
                                  strided ? call.hidden.stride : problem.hidden};
  Status status = gpu::map_rows(of_tokens, kHitTokens, &job.maps[0]);
  if (status.ok() && !kSingle) {
    const gpu::MappedRows of_y{call.work.y, i64{T::kPlanes} * rows_of_y, problem.inter, problem.inter};
    status = gpu::map_rows(of_y, kHitTokens, &job.maps[1]);
  }
  if (status.ok() && call.slots.tokens > kHitTokens) status = gpu::map_rows(of_tokens, 1, &job.maps[2]);
  if (!status.ok()) return status;
  const gpu::LaunchShape shape{multiprocessors, T::kThreads, shared_bytes<T, Job>(), true};
  return gpu::launch(multiply_tiles<T, Job>, shape, stream, job);
}

template <bool kByPick, class T>
Status launch_tokens(const Whole& call, i32 multiprocessors, void* stream) {
  if (call.slots.tokens == 1) return launch_layer<T, true, kByPick>(call, multiprocessors, stream);
  return launch_layer<T, false, kByPick>(call, multiprocessors, stream);
}

template <bool kByPick, int kTile = kWholeTile>
Status launch_shape(int tile, const Whole& call, i32 multiprocessors, void* stream) {
  if constexpr (kTile < kAllTileShapes) {
    if constexpr (!kByPick || takes_pick_rows(kTile)) {
      if constexpr (!Tiles<kTile>::kDense) {
        const bool powers = call.slots.problem.encoding == format::Encoding::mxfp4;
        if (tile == kTile && powers) return launch_tokens<kByPick, Tiles<kTile, true>>(call, multiprocessors, stream);
      }
      if (tile == kTile) return launch_tokens<kByPick, Tiles<kTile>>(call, multiprocessors, stream);
    }
    return launch_shape<kByPick, kTile + 1>(tile, call, multiprocessors, stream);
  } else {
    return refuse(Reason::internal, "no tile " + std::to_string(tile));
  }
}

// whole_picks.cu
Status launch_by_pick(int tile, const Whole& call, i32 multiprocessors, void* stream);

}  // namespace fourmoe::sm90
