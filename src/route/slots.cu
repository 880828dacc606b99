#include <cooperative_groups.h>

#include <algorithm>

#include "gpu/isa/launch.cuh"
#include "gpu/launch.cuh"
#include "route/few.cuh"
#include "route/pick.cuh"

namespace fourmoe::route {
namespace {

namespace cluster = cooperative_groups;

constexpr i32 kPickWarps = 4;
constexpr i32 kSharedBytes = 48 << 10;  // what every device gives a block unasked
constexpr i32 kFewBytes = 96 << 10;     // asked for, for few tokens
constexpr i32 kClusterBlocks = 8;       // what every device with clusters allows
constexpr i32 kBlockTokens = 8;         // screened in one block before there are two

struct Picking {
  DeviceSlots slots;
  bool screened;
};

__global__ void __launch_bounds__(kPickWarps * 32, 3) pick_tokens(const __grid_constant__ Picking call) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const DeviceSlots& a = call.slots;
  const i32 warp = gpu::isa::uniform(threadIdx.x / 32);
  const i32 token = blockIdx.x * (blockDim.x / 32) + warp;
  Team team = {token < a.tokens ? token : -1, 0, 1, call.screened, threadIdx.x % 32};
  place_team(a.problem, shared, warp, &team);
  write_pick(a, team, pick_token(a, team, [] { __syncwarp(); }));
}

// A call for one cluster: each block has some tokens, and as many warps for each.
struct Few {
  DeviceSlots slots;
  i32 tokens;  // of a block, at most kMaxWarps
  i32 warps;   // of a team
  bool screened;
};

__device__ Team team_of(const Few& few, u64* memory) {
  const i32 warp = gpu::isa::uniform(threadIdx.x / 32);
  const i32 index = warp / few.warps;
  const i32 token = blockIdx.x * few.tokens + index;
  const bool real = index < few.tokens && token < few.slots.tokens;
  Team team = {real ? token : -1, warp % few.warps, few.warps, few.screened, threadIdx.x % 32};
  place_team(few.slots.problem, memory, real ? index : 0, &team);
  return team;
}

// The cluster picks into the first block's shared memory, then that block sorts.
__global__ void __launch_bounds__(kMaxWarps * 32, 1) pick_and_sort(const __grid_constant__ Few call) {
  extern __shared__ uint4 keys[];
  const cluster::cluster_group blocks = cluster::this_cluster();
  const bool many = gridDim.x > 1;
  if (many) blocks.barrier_arrive();  // every block has started before another writes into its memory
  gpu::begin();
  const DeviceSlots& a = call.slots;
  const FewPicks few = few_picks(a, keys);
  pad_keys(few);
  const Team team = team_of(call, reinterpret_cast<u64*>(few.bytes));
  const Pick pick = pick_token(a, team, [] { __syncthreads(); });
  if (many) blocks.barrier_wait();
  if (has_pick(a, team)) {
    const i32 index = static_cast<i32>(pick_index(a, team));
    blocks.map_shared_rank(few.keys, 0)[index] = key_of_pick(a, pick.id, index);
  }
  if (many) blocks.sync();
  else __syncthreads();
  write_pick(a, team, pick);  // not before: the barrier would wait for it
  if (blockIdx.x != 0) return;
  place_few(a, few);
  if (threadIdx.x == 0) settle_fault(a);
}

// Bad ids of the caller's, a thread a pick: notes their tokens in `refused`.
__device__ void find_bad_ids(const DeviceSlots& a, i32 picks, u32* refused) {
  const i32 top_k = a.problem.top_k;
  for (i32 token = threadIdx.x; token < a.tokens; token += blockDim.x) refused[token] = 0;
  __syncthreads();
  for (i32 pick = threadIdx.x; pick < picks; pick += blockDim.x) {
    const i64 id = read_id(a, pick / top_k, pick % top_k);
    if (id >= -1 && id < a.problem.experts) continue;
    atomicOr(&refused[pick / top_k], 1u);
    atomicMin(reinterpret_cast<unsigned long long*>(&a.fault->first),
              gpu::fault_key(gpu::FaultKind::id, pick / top_k, pick % top_k));
  }
  __syncthreads();
}

// One block; `refused` lies where place_few counts.
__global__ void __launch_bounds__(kMaxWarps * 32, 1) take_and_sort(const __grid_constant__ DeviceSlots a) {
  extern __shared__ uint4 keys[];
  gpu::begin();
  const FewPicks few = few_picks(a, keys);
  u32* refused = reinterpret_cast<u32*>(few.bytes);
  pad_keys(few);
  find_bad_ids(a, few.picks, refused);
  for (i32 pick = threadIdx.x; pick < few.picks; pick += blockDim.x) {
    const i32 token = pick / a.problem.top_k;
    const i32 position = pick % a.problem.top_k;
    const i32 id = refused[token] != 0 ? kRefused : static_cast<i32>(read_id(a, token, position));
    few.keys[pick] = key_of_pick(a, id, pick);
    a.out.ids[pick] = id;
    a.out.weights[pick] = id < 0 ? 0.0f : gpu::read(a.in.weights.row(token), a.in.weights.dtype, position);
  }
  __syncthreads();
  place_few(a, few);
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

// What sorting leaves behind where there is nothing to sort.
Status clear_slots(const DeviceSlots& args, void* stream) {
  const i32 local = args.problem.local_experts;
  const auto native = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaMemsetAsync(args.out.expert_begin, 0, (local + 1) * sizeof(i32), native);
  if (error != cudaSuccess || args.out.progress == nullptr) return gpu::to_status(error, "clearing of expert_begin");
  return gpu::to_status(cudaMemsetAsync(args.out.progress, 0, progress_words(local) * sizeof(u64), native),
                        "clearing of progress");
}

bool can_place_few(const DeviceSlots& args) {
  const i32 picks = args.tokens * args.problem.top_k;
  const i32 local = args.problem.local_experts;
  return args.tokens > 0 && args.tokens <= kFewTokens && picks <= kMostCounted &&
         local < static_cast<i32>(kRefusedExpert) && key_bytes(picks) + few_bytes(local, picks) <= kSharedBytes;
}

// Threads that place a few picks at once, at least `least`.
i32 few_threads(const DeviceSlots& args, i32 least) {
  const i32 picks = args.tokens * args.problem.top_k;
  const i32 items = picks <= kCompared ? args.problem.local_experts + 1 + picks : kMaxWarps * 32;
  return std::min((std::max(items, least) + 31) / 32, kMaxWarps) * 32;
}

i32 few_blocks(const DeviceSlots& args) {
  const i32 wanted = can_screen(args) ? (args.tokens + kBlockTokens - 1) / kBlockTokens : args.tokens;
  return std::min(wanted, kClusterBlocks);
}

// Bytes of a block's shared memory, as many blocks as few_blocks says.
i32 pick_few_bytes(const DeviceSlots& args, i32 tokens) {
  const i32 picks = args.tokens * args.problem.top_k;
  return key_bytes(picks) +
         std::max(tokens * 8 * team_words(args.problem), few_bytes(args.problem.local_experts, picks));
}

i32 block_tokens(const DeviceSlots& args) {
  const i32 blocks = few_blocks(args);
  return (args.tokens + blocks - 1) / blocks;
}

bool can_pick_few(const DeviceSlots& args) {
  return block_tokens(args) <= kMaxWarps && pick_few_bytes(args, block_tokens(args)) <= kFewBytes;
}

Status launch_pick_few(const DeviceSlots& args, void* stream) {
  const i32 tokens = block_tokens(args);
  Few few = {args, tokens, can_screen(args) ? 1 : kMaxWarps, can_screen(args)};
  while (few.warps * tokens > kMaxWarps) few.warps /= 2;
  const i32 blocks = few_blocks(args);
  const i32 bytes = pick_few_bytes(args, tokens);
  const cudaError_t error = cudaFuncSetAttribute(pick_and_sort, cudaFuncAttributeMaxDynamicSharedMemorySize, kFewBytes);
  if (error != cudaSuccess) return gpu::to_status(error, "shared memory of pick_and_sort");
  return gpu::launch("pick_and_sort", pick_and_sort,
                     {blocks, few_threads(args, few.warps * tokens * 32), bytes, blocks}, few, stream);
}

Status launch_take_few(const DeviceSlots& args, void* stream) {
  const i32 picks = args.tokens * args.problem.top_k;
  const i32 bytes = key_bytes(picks) + std::max(4 * args.tokens, few_bytes(args.problem.local_experts, picks));
  return gpu::launch("take_and_sort", take_and_sort, {1, few_threads(args, picks), bytes}, args, stream);
}

}  // namespace

Status launch_pick(const DeviceSlots& args, void* stream) {
  const i32 bytes = 8 * team_words(args.problem);
  const i32 warps = std::clamp(kSharedBytes / bytes, 1, kPickWarps);
  return gpu::launch("pick", pick_tokens, {(args.tokens + warps - 1) / warps, warps * 32, warps * bytes},
                     Picking{args, can_screen(args)}, stream);
}

Status launch_sort(const DeviceSlots& args, void* stream) {
  if (args.tokens == 0) return clear_slots(args, stream);
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
  if (can_place_few(args)) {
    if (args.in.logits.data == nullptr) return launch_take_few(args, stream);
    if (can_pick_few(args)) return launch_pick_few(args, stream);
  }
  const Status status = launch_pick(args, stream);
  return status.ok() ? launch_sort(args, stream) : status;
}

}  // namespace fourmoe::route
