#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm1.h"

namespace fourmoe::sm90 {

Status launch(const Gemm1& call, i32 multiprocessors, void* stream) {
  const int rows = call.activation.gated() ? 2 * call.inter : call.inter;
  Operands operands{};
  operands.blobs = call.blobs;
  operands.expert_begin = call.expert_begin;
  operands.experts = call.experts;
  operands.row_tiles = row_tiles(rows);
  operands.steps = k_steps(call.hidden);
  const Activate epilogue{call.globals, call.gate_bias, call.up_bias, call.activation, call.y, call.y_wide, call.inter};
  const int tile =
      call.tile >= 0 ? call.tile : choose(operands.row_tiles, call.experts, call.expected_slots, multiprocessors);
  return launch_tile(tile, {call.rows, call.max_slots, call.hidden}, operands, epilogue, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
