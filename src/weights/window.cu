// Window of matrices in device memory.
#include "gpu/launch.cuh"
#include "weights/device_packed.h"
#include "weights/window.h"

namespace fourmoe::weights {
namespace {

constexpr int kThreads = 256;
constexpr u32 kAll = 0xffffffffu;

// Any alignment: a checkpoint's tensors begin where they like.
__device__ bool is_zero(const u8* codes, int bytes) {
  u32 any = 0;
  for (int i = 0; i < bytes; ++i) any |= codes[i];
  return (any & 0x77u) == 0;
}

struct Seen {
  u32 most = 0;
  u32 behind = 0;

  __device__ void add(u32 scale) {
    most = max(most, scale);
    behind = max(behind, 255 - scale);
  }
  // The warp's threads together; the first one writes.
  __device__ void join(FoundExponents::Range* range) {
    most = __reduce_max_sync(kAll, most);
    behind = __reduce_max_sync(kAll, behind);
    if (threadIdx.x % 32 != 0) return;
    atomicMax(&range->most, most);
    atomicMax(&range->behind, behind);
  }
};

// A block of threads takes a row, a thread some of its blocks of 32.
__global__ void __launch_bounds__(kThreads) find_in_rows(Rows matrix, i32 cols, FoundExponents* found) {
  constexpr int kCodes = format::block_of(format::Encoding::mxfp4) / 2;
  const u8* scales = matrix.scales + i64{blockIdx.x} * matrix.scales_stride;
  const u8* codes = matrix.values + i64{blockIdx.x} * matrix.values_stride;
  Seen all, used;
  for (int block = threadIdx.x; block < cols / (2 * kCodes); block += kThreads) {
    const u32 scale = scales[block];
    all.add(scale);
    if (scale == kNotANumber || !is_zero(codes + block * kCodes, kCodes)) used.add(scale);
  }
  all.join(&found->all);
  used.join(&found->used);
}

}  // namespace

Status find_exponents(const Rows& matrix, i32 rows, i32 cols, FoundExponents* found, gpu::Stream stream) {
  return gpu::launch_after("find_exponents", find_in_rows, rows, kThreads, stream, matrix, cols, found);
}

}  // namespace fourmoe::weights
