#include "backends/sm90/gemm2.cuh"
#include "backends/sm90/gemm2.h"

namespace fourmoe::sm90 {

Status launch(const Gemm2& call, i32 multiprocessors, void* stream) {
  Operands operands{};
  operands.blobs = call.blobs;
  operands.expert_begin = call.expert_begin;
  operands.experts = call.experts;
  operands.row_tiles = row_tiles(call.hidden);
  operands.steps = k_steps(call.inter);
  operands.early_weights = call.follows_gemm1;
  const Project epilogue{call.globals, call.bias, call.z, call.hidden};
  const int tile =
      call.tile >= 0 ? call.tile : choose(operands.row_tiles, call.experts, call.expected_slots, multiprocessors);
  return launch_tile(tile, {call.rows, call.max_slots, call.inter}, operands, epilogue, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
