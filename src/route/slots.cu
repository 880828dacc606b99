#include <cooperative_groups.h>

#include <algorithm>

#include "gpu/launch.cuh"
#include "route/sort.cuh"

namespace fourmoe::route {
namespace {

namespace cluster = cooperative_groups;

constexpr i32 kPickWarps = 4;
constexpr i32 kSharedBytes = 48 << 10;  // what every device gives a block unasked
constexpr i32 kClusterBlocks = 8;       // what every device with clusters allows

__global__ void __launch_bounds__(kPickWarps * 32, 4) pick_tokens(const DeviceSlots a) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const i32 warp = threadIdx.x / 32;
  const i32 token = blockIdx.x * (blockDim.x / 32) + warp;
  Team team = {token < a.tokens ? token : -1, 0, 1, threadIdx.x % 32};
  place_team(a.problem, shared, warp, &team);
  write_pick(a, team, pick_token(a, team, [] { __syncwarp(); }));
}

// A call for one cluster: each block has some tokens, and as many warps for each.
struct Few {
  DeviceSlots slots;
  i32 tokens;     // of a block, at most kMaxWarps
  i32 warps;      // of a team
  i32 sorters;    // warps that sort
  i32 ids_bytes;  // of all ids, in the first block's shared memory
};

__device__ Team team_of(const Few& few, u64* keys) {
  const i32 warp = threadIdx.x / 32;
  const i32 index = warp / few.warps;
  const i32 token = blockIdx.x * few.tokens + index;
  Team team = {index < few.tokens && token < few.slots.tokens ? token : -1, warp % few.warps, few.warps,
               threadIdx.x % 32};
  place_team(few.slots.problem, keys, index, &team);
  return team;
}

// The cluster picks into the first block's shared memory, then that block sorts.
__global__ void __launch_bounds__(kMaxWarps * 32, 1) pick_and_sort(const Few few) {
  extern __shared__ u64 shared[];
  const cluster::cluster_group blocks = cluster::this_cluster();
  blocks.barrier_arrive();  // every block has started before another writes into its memory
  gpu::begin();
  const DeviceSlots& a = few.slots;
  u64* memory = shared + few.ids_bytes / 8;
  const Team team = team_of(few, memory);
  const Pick pick = pick_token(a, team, [] { __syncthreads(); });
  blocks.barrier_wait();
  i32* ids = blocks.map_shared_rank(reinterpret_cast<i32*>(shared), 0);
  if (has_pick(a, team)) ids[pick_index(a, team)] = pick.id;
  blocks.sync();
  write_pick(a, team, pick);  // not before: the barrier would wait for it
  if (blockIdx.x != 0) return;
  const Sorting s =
      sorting(a, {0, a.tokens * a.problem.top_k}, few.sorters, reinterpret_cast<const i32*>(shared), memory);
  count_chunk(a, s);
  begin_experts(a, 1, 0, s);
  place_chunk(a, s);
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

__global__ void __launch_bounds__(kMaxWarps * 32, 2) place_chunks(const Chunks chunks) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const DeviceSlots& a = chunks.slots;
  const Sorting s = sorting(a, chunk_of(a, chunks.size), blockDim.x / 32, a.out.ids, shared);
  count_chunk(a, s);
  begin_experts(a, gridDim.x, blockIdx.x, s);
  place_chunk(a, s);
  if (blockIdx.x == 0 && threadIdx.x == 0) settle_fault(a);
}

// Warps whose counts fit.
i32 sort_warps(i32 local, i32 bytes) {
  i32 warps = kMaxWarps;
  while (sort_bytes(local, warps) > bytes) --warps;
  return warps;
}

Status set_expert_begin(const DeviceSlots& args, void* stream) {
  const cudaError_t error = cudaMemsetAsync(args.out.expert_begin, 0, 4 * (i64{args.problem.local_experts} + 1),
                                            static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return {};
  return refuse(Reason::internal, std::string("expert_begin was not cleared: ") + cudaGetErrorString(error));
}

i32 ids_bytes(const DeviceSlots& args) { return (args.tokens * args.problem.top_k * 4 + 15) / 16 * 16; }

// Tokens that a block of a cluster has memory for.
i32 block_tokens(const DeviceSlots& args) {
  return std::min((kSharedBytes - ids_bytes(args)) / (8 * team_words(args.problem)), kMaxWarps);
}

bool is_few(const DeviceSlots& args) {
  if (args.tokens == 0 || args.tokens > kFewTokens) return false;
  const i32 blocks = std::min(args.tokens, kClusterBlocks);
  return (args.tokens + blocks - 1) / blocks <= block_tokens(args);
}

Status launch_few(const DeviceSlots& args, void* stream) {
  const i32 blocks = std::min(args.tokens, kClusterBlocks);
  const i32 picks = args.tokens * args.problem.top_k;
  const i32 local = args.problem.local_experts;
  Few few = {args, (args.tokens + blocks - 1) / blocks, kMaxWarps, 0, ids_bytes(args)};
  while (few.warps * few.tokens > kMaxWarps) few.warps /= 2;
  few.sorters = std::min((picks + 31) / 32, sort_warps(local, kSharedBytes - few.ids_bytes));
  const i32 bytes = few.ids_bytes + std::max(few.tokens * 8 * team_words(args.problem), sort_bytes(local, few.sorters));
  return gpu::launch("pick_and_sort", pick_and_sort, {blocks, kMaxWarps * 32, bytes, blocks}, few, stream);
}

}  // namespace

Status launch_pick(const DeviceSlots& args, void* stream) {
  const i32 bytes = 8 * team_words(args.problem);
  const i32 warps = std::clamp(kSharedBytes / bytes, 1, kPickWarps);
  return gpu::launch("pick", pick_tokens, {(args.tokens + warps - 1) / warps, warps * 32, warps * bytes}, args, stream);
}

Status launch_sort(const DeviceSlots& args, void* stream) {
  if (args.tokens == 0) return set_expert_begin(args, stream);
  const i64 picks = i64{args.tokens} * args.problem.top_k;
  const i32 local = args.problem.local_experts;
  const Chunks chunks = {args, chunk_picks(picks)};
  const i64 blocks = (picks + chunks.size - 1) / chunks.size;
  const i32 warps = sort_warps(local, kSharedBytes);
  Status status = {};
  if (blocks > 1) status = gpu::launch("count", count_chunks, {blocks, 256, 4 * local}, chunks, stream);
  if (!status.ok()) return status;
  return gpu::launch("place", place_chunks, {blocks, warps * 32, sort_bytes(local, warps)}, chunks, stream);
}

Status launch_slots(const DeviceSlots& args, void* stream) {
  if (is_few(args)) return launch_few(args, stream);
  const Status status = launch_pick(args, stream);
  return status.ok() ? launch_sort(args, stream) : status;
}

}  // namespace fourmoe::route
