#include "backends/sm90/gemm2.cuh"
#include "backends/sm90/gemm2.h"
#include "backends/sm90/tiles_product.cuh"

namespace fourmoe::sm90 {

Status launch(const Gemm2& call, i32 multiprocessors, void* stream) {
  const Operands weights{call.blobs, call.experts, row_tiles(call.hidden), k_steps(call.inter),
                         static_cast<i32>(call.max_slots)};
  const Project epilogue{call.globals, call.bias, call.z, call.hidden};
  const Load load{weights.row_tiles, call.experts, call.expected_slots, call.split, false};
  int tile = call.tile >= 0 ? call.tile : choose(call.form);
  if (tile < 0) tile = choose(load, multiprocessors);
  const Gemm<Project> gemm{{call.rows, call.max_slots * call.form.planes, call.inter, call.inter},
                           weights,
                           call.expert_begin,
                           epilogue,
                           call.follows_gemm1,
                           call.powers,
                           call.progress};
  return launch_tile(tile, gemm, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
