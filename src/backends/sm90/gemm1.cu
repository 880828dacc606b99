#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm1.h"
#include "backends/sm90/tiles_product.cuh"

namespace fourmoe::sm90 {
namespace {

template <int kPlanes>
Status launch_planes(const Gemm1& call, i32 multiprocessors, void* stream) {
  const int rows = call.activation.gated() ? 2 * call.inter : call.inter;
  const Operands weights{call.blobs, call.experts, row_tiles(rows), k_steps(call.hidden),
                         static_cast<i32>(call.max_slots)};
  const Activate<kPlanes> epilogue{call.globals, call.gate_bias, call.up_bias, call.activation,
                                   call.y,       call.y_wide,    call.inter,   call.max_slots * call.inter};
  const Load load{weights.row_tiles, call.experts, call.expected_slots, call.split, true};
  int tile = call.tile >= 0 ? call.tile : choose(call.form);
  if (tile < 0) tile = choose(load, multiprocessors);
  const Gemm<Activate<kPlanes>> gemm{{call.rows, call.max_slots * kPlanes, call.hidden, call.hidden},
                                     weights,
                                     call.expert_begin,
                                     epilogue,
                                     call.follows_rows,
                                     call.powers,
                                     call.progress};
  return launch_tile(tile, gemm, multiprocessors, stream);
}

}  // namespace

Status launch(const Gemm1& call, i32 multiprocessors, void* stream) {
  return call.form.planes == 2 ? launch_planes<2>(call, multiprocessors, stream)
                               : launch_planes<1>(call, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
