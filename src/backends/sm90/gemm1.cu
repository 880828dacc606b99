#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm1.h"

namespace fourmoe::sm90 {

Status launch(const Gemm1& call, i32 multiprocessors, void* stream) {
  const int rows = call.activation.gated() ? 2 * call.inter : call.inter;
  const Operands weights{call.blobs, call.experts, row_tiles(rows), k_steps(call.hidden)};
  const Activate epilogue{call.globals, call.gate_bias, call.up_bias, call.activation, call.y, call.y_wide, call.inter};
  const Load load{weights.row_tiles, call.experts, call.expected_slots, call.split};
  const int tile = call.tile >= 0 ? call.tile : choose(load, multiprocessors);
  const Gemm<Activate> gemm{
      {call.rows, call.max_slots, call.hidden, call.hidden}, weights, call.expert_begin, epilogue, false};
  return launch_tile(tile, gemm, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
