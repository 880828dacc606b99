#include "gpu/launch.cuh"
#include "weights/bad_scale.h"
#include "weights/device_packed.h"

namespace fourmoe::weights {
namespace {

constexpr int kThreads = 256;

// A block of threads takes a row. Bytes, since a checkpoint's rows begin where they like.
__global__ void __launch_bounds__(kThreads) find_in_rows(Rows matrix, u32 largest, i32 blocks, u64* found) {
  const u8* scales = matrix.scales + i64{blockIdx.x} * matrix.scales_stride;
  for (int block = threadIdx.x; block < blocks; block += kThreads) {
    const u32 byte = scales[block];
    if (byte <= largest) continue;
    const u64 index = u64{blockIdx.x} * blocks + block;
    atomicMin(reinterpret_cast<unsigned long long*>(found), index << 8 | byte);
    return;  // this thread's later ones come after it
  }
}

}  // namespace

Status find_bad_scale(const Rows& matrix, format::Encoding encoding, i32 rows, i32 cols, u64* found,
                      gpu::Stream stream) {
  return gpu::launch_after("find_bad_scale", find_in_rows, rows, kThreads, stream, matrix,
                           format::largest_scale(encoding), cols / format::block_of(encoding), found);
}

}  // namespace fourmoe::weights
