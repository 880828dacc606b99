#include "combine/sum.cuh"
#include "gpu/launch.cuh"
#include "gpu/rows.h"

namespace fourmoe::combine {
namespace {

// How a call is cut: threads of a block, its blocks on a multiprocessor, rows in flight a thread.
template <int kThreadsOfBlock, int kBlocksAtOnce, int kRowsAtOnce>
struct Cut {
  static constexpr int kThreads = kThreadsOfBlock;
  static constexpr int kBlocks = kBlocksAtOnce;
  static constexpr int kRows = kRowsAtOnce;
};
using Many = Cut<256, 6, kBatch>;       // enough rows on their way to keep the memory busy
using Few = Cut<128, 6, 8>;             // all blocks run at once, and wait for memory once
constexpr i64 kFewColumns = 64 * 7168;  // of all tokens: about what multiprocessors hold in one go

// A block has a quad of columns of one token for each thread.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) sum_picks(const __grid_constant__ DeviceSum sum) {
  gpu::begin();
  const i32 quads = sum.hidden / 4;
  const i32 parts = (quads + C::kThreads - 1) / C::kThreads;
  const i64 token = blockIdx.x / parts;
  const i32 at = static_cast<i32>(blockIdx.x % parts * C::kThreads + threadIdx.x);
  const i32 quad = min(at, quads - 1);  // all lanes keep step
  const gpu::Columns<4> acc = sum_columns<C::kRows, 4>(sum, token, quad);
  if (at < quads) gpu::store_columns(sum.out.output.row(token), sum.out.output.dtype, quad, acc);
}

template <class C>
Status launch_cut(const DeviceSum& sum, void* stream) {
  const i64 parts = (sum.hidden / 4 + C::kThreads - 1) / C::kThreads;
  return gpu::launch("combine", sum_picks<C>, {sum.tokens * parts, C::kThreads}, sum, stream);
}

}  // namespace

Status launch_combine(const DeviceSum& sum, void* stream) {
  if (sum.tokens == 0) return {};
  if (Status status = gpu::check_rows("output", sum.out.output); !status.ok()) return status;
  const bool few = i64{sum.tokens} * sum.hidden <= kFewColumns;
  return few ? launch_cut<Few>(sum, stream) : launch_cut<Many>(sum, stream);
}

}  // namespace fourmoe::combine
