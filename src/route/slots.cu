#include <cooperative_groups.h>

#include <algorithm>

#include "gpu/launch.cuh"
#include "route/sort.cuh"

namespace fourmoe::route {
namespace {

constexpr i32 kMaxWarps = 16;
constexpr i32 kPickWarps = 4;
constexpr i32 kSharedBytes = 48 << 10;  // what every device gives a block unasked
constexpr i32 kClusterBlocks = 8;       // what every device with clusters allows

__global__ void __launch_bounds__(kPickWarps * 32, 4) pick_tokens(const DeviceSlots a) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const u32 warp = threadIdx.x / 32;
  const i32 token = blockIdx.x * (blockDim.x / 32) + warp;
  if (token < a.tokens) pick_token(a, token, threadIdx.x % 32, warp_memory(a.problem, shared, warp));
}

// One cluster picks, then its first block sorts.
__global__ void __launch_bounds__(kMaxWarps * 32, 1) pick_and_sort(const DeviceSlots a) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const u32 warps = blockDim.x / 32;
  const u32 warp = threadIdx.x / 32;
  const WarpMemory memory = warp_memory(a.problem, shared, warp);
  for (i32 token = blockIdx.x * warps + warp; token < a.tokens; token += gridDim.x * warps) {
    __syncwarp();
    pick_token(a, token, threadIdx.x % 32, memory);
  }
  if (gridDim.x > 1) cooperative_groups::this_cluster().sync();
  else __syncthreads();
  if (blockIdx.x != 0) return;
  const SortMemory m = sort_memory(a.problem.local_experts, shared);
  const Span all = {0, a.tokens * a.problem.top_k};
  count_chunk(a, all, m);
  begin_experts(a, 1, 0, m);
  place_chunk(a, all, m);
  if (threadIdx.x == 0) settle_fault(a);
}

__device__ Span chunk_of(const DeviceSlots& a, i32 chunk_size) {
  const i32 begin = blockIdx.x * chunk_size;
  return {begin, min(begin + chunk_size, a.tokens * a.problem.top_k)};
}

struct Chunks {
  DeviceSlots slots;
  i32 size;  // picks of a chunk
};

__global__ void __launch_bounds__(kMaxWarps * 32) count_chunks(const Chunks chunks) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const DeviceSlots& a = chunks.slots;
  const i32 local = a.problem.local_experts;
  u32* counts = reinterpret_cast<u32*>(shared);
  for (i32 e = threadIdx.x; e < local; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const Span chunk = chunk_of(a, chunks.size);
  for (i32 pick = chunk.begin + threadIdx.x; pick < chunk.end; pick += blockDim.x) {
    const i32 e = local_of(a, a.out.ids[pick]);
    if (e >= 0) atomicAdd(&counts[e], 1u);
  }
  __syncthreads();
  for (i32 e = threadIdx.x; e < local; e += blockDim.x) a.chunk_counts[i64{blockIdx.x} * local + e] = counts[e];
}

__global__ void __launch_bounds__(kMaxWarps * 32) place_chunks(const Chunks chunks) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const DeviceSlots& a = chunks.slots;
  const SortMemory m = sort_memory(a.problem.local_experts, shared);
  const Span chunk = chunk_of(a, chunks.size);
  count_chunk(a, chunk, m);
  begin_experts(a, gridDim.x, blockIdx.x, m);
  place_chunk(a, chunk, m);
  if (blockIdx.x == 0 && threadIdx.x == 0) settle_fault(a);
}

i32 pick_warps(const Problem& problem, i32 most) { return std::clamp(kSharedBytes / warp_bytes(problem), 1, most); }

i32 sort_warps(i32 local) {
  i32 warps = kMaxWarps;
  while (sort_bytes(local, warps) > kSharedBytes) --warps;
  return warps;
}

Status set_expert_begin(const DeviceSlots& args, void* stream) {
  const cudaError_t error = cudaMemsetAsync(args.out.expert_begin, 0, 4 * (i64{args.problem.local_experts} + 1),
                                            static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return {};
  return refuse(Reason::internal, std::string("expert_begin was not cleared: ") + cudaGetErrorString(error));
}

Status launch_few(const DeviceSlots& args, void* stream) {
  const i32 warps = std::min(pick_warps(args.problem, kMaxWarps), sort_warps(args.problem.local_experts));
  const i32 blocks = std::min((args.tokens + warps - 1) / warps, kClusterBlocks);
  const i32 bytes = std::max(warps * warp_bytes(args.problem), sort_bytes(args.problem.local_experts, warps));
  return gpu::launch("pick_and_sort", pick_and_sort, {blocks, warps * 32, bytes, blocks}, args, stream);
}

}  // namespace

Status launch_pick(const DeviceSlots& args, void* stream) {
  const i32 warps = pick_warps(args.problem, kPickWarps);
  return gpu::launch("pick", pick_tokens,
                     {(args.tokens + warps - 1) / warps, warps * 32, warps * warp_bytes(args.problem)}, args, stream);
}

Status launch_sort(const DeviceSlots& args, void* stream) {
  if (args.tokens == 0) return set_expert_begin(args, stream);
  const i64 picks = i64{args.tokens} * args.problem.top_k;
  const i32 local = args.problem.local_experts;
  const Chunks chunks = {args, chunk_picks(picks)};
  const i64 blocks = (picks + chunks.size - 1) / chunks.size;
  const i32 warps = sort_warps(local);
  Status status = {};
  if (blocks > 1) status = gpu::launch("count", count_chunks, {blocks, 256, 4 * local}, chunks, stream);
  if (!status.ok()) return status;
  return gpu::launch("place", place_chunks, {blocks, warps * 32, sort_bytes(local, warps)}, chunks, stream);
}

Status launch_slots(const DeviceSlots& args, void* stream) {
  if (args.tokens > 0 && i64{args.tokens} * args.problem.top_k <= kFewPicks) return launch_few(args, stream);
  const Status status = launch_pick(args, stream);
  return status.ok() ? launch_sort(args, stream) : status;
}

}  // namespace fourmoe::route
