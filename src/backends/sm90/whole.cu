#include "backends/sm90/whole.cuh"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "route/pick.cuh"

namespace fourmoe::sm90 {
namespace {

constexpr int kWarps = route::kMaxWarps;

struct Prepare {
  route::DeviceSlots slots;
  format::Tensor hidden;
  Work work;
  i32 most;                          // hits that there is room for
  i32 row_tiles;                     // of gemm2
  const std::byte* const* blobs[2];  // [local experts] of each GEMM
};

// Every expert's tokens -> experts hit, in order; `hit_of` receives each one's number. One warp.
__device__ void list_hits(const Prepare& a, const u32* tokens_of, i32* hit_of) {
  const int lane = threadIdx.x % 32;
  int hits = 0;
  for (int first = 0; first < a.slots.problem.local_experts; first += 32) {
    const int expert = first + lane;
    const u32 tokens = expert < a.slots.problem.local_experts ? tokens_of[expert] : 0;
    const u32 hit = __ballot_sync(~0u, tokens != 0);
    const int number = hits + __popc(hit & ((1u << lane) - 1u));
    if (tokens != 0) {
      a.work.list[number] = {{a.blobs[0][expert], a.blobs[1][expert]}, expert, tokens};
      a.work.ready[number] = 0;
      hit_of[expert] = number;
    }
    hits += __popc(hit);
  }
  for (int i = hits + lane; i < a.most; i += 32) a.work.list[i] = {};
  if (lane == 0) *a.work.hits = hits, *a.work.tickets = 0;
}

__device__ void round_tokens(const Prepare& a) {
  const i32 octets = a.slots.problem.hidden / 8;
  for (i32 i = threadIdx.x; i < a.slots.tokens * octets; i += blockDim.x) {
    f32 x[8];
    gpu::load_octet(a.hidden.row(i / octets), a.hidden.dtype, i % octets, x);
    reinterpret_cast<uint4*>(a.work.rows)[i] = gpu::octet_bf16(x);
  }
}

// One block: picks, the experts hit, and counters at zero. Shared memory: a team's memory for each token, then
// [local_experts] tokens_of and hit_of.
__global__ void __launch_bounds__(kWarps * 32, 1) find_hits(const Prepare a) {
  extern __shared__ u64 shared[];
  gpu::begin();
  const Problem& problem = a.slots.problem;
  const i32 local = problem.local_experts;
  u32* tokens_of = reinterpret_cast<u32*>(shared + a.slots.tokens * route::team_words(problem));
  i32* hit_of = reinterpret_cast<i32*>(tokens_of + local);
  for (int e = threadIdx.x; e < local; e += blockDim.x) tokens_of[e] = 0;
  for (int i = threadIdx.x; i < a.row_tiles; i += blockDim.x) a.work.done[i] = 0;
  const int warp = gpu::isa::uniform(threadIdx.x / 32);
  int warps = kWarps;  // of a team
  while (kWarps / warps < a.slots.tokens) warps /= 2;
  route::Team team{warp / warps < a.slots.tokens ? warp / warps : -1, warp % warps, warps, threadIdx.x % 32};
  route::place_team(problem, shared, max(team.token, 0), &team);
  const route::Pick pick = route::pick_token(a.slots, team, [] { __syncthreads(); });
  __syncthreads();
  const bool has = route::has_pick(a.slots, team);
  const i32 expert = has ? pick.id - problem.first_expert : -1;
  const bool here = pick.id >= 0 && expert >= 0 && expert < local;
  if (here) atomicOr(&tokens_of[expert], 1u << team.token);
  __syncthreads();
  if (warp == 0) list_hits(a, tokens_of, hit_of);
  if (a.hidden.dtype != format::Dtype::bf16) round_tokens(a);
  // The fault may be the host's memory, microseconds away: it is read only where this call has something to say.
  const bool refused = __syncthreads_or(has && pick.id == route::kRefused) != 0;
  route::write_pick(a.slots, team, pick);
  if (has) {
    const i32 row = here ? hit_of[expert] * kFewTokens + team.token : pick.id == route::kRefused ? pick.id : -1;
    a.slots.out.pick_slot[route::pick_index(a.slots, team)] = row;
  }
  if (refused && threadIdx.x == 0) route::settle_fault(a.slots);
}

Status launch_find(const Whole& call, void* stream) {
  const Problem& problem = call.slots.problem;
  const Prepare args{call.slots,
                     call.hidden,
                     call.work,
                     most_hits(problem),
                     row_tiles(problem.hidden),
                     {call.table->gemm1, call.table->gemm2}};
  const int bytes = call.slots.tokens * 8 * route::team_words(problem) + 8 * problem.local_experts;
  const cudaError_t error = cudaFuncSetAttribute(find_hits, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return gpu::to_status(error, "shared memory of find_hits");
  return gpu::launch("find_hits", find_hits, {1, kWarps * 32, bytes}, args, stream);
}

template <int kTile>
Status launch_layer(const Whole& call, i32 multiprocessors, void* stream) {
  using T = Tiles<kTile>;
  const Problem& problem = call.slots.problem;
  const weights::DeviceTable& table = *call.table;
  const i32 rows1 = problem.activation.gated() ? 2 * problem.inter : problem.inter;
  Layer<T> job{};
  job.gemms[0] = {table.gemm1, problem.local_experts, row_tiles(rows1), k_steps(problem.hidden)};
  job.gemms[1] = {table.gemm2, problem.local_experts, row_tiles(problem.hidden), k_steps(problem.inter)};
  job.activate = {table.gemm1_globals, table.gate_bias, table.up_bias, problem.activation,
                  call.work.y,         nullptr,         problem.inter};
  job.project = {table.gemm2_globals, table.down_bias, call.work.z, problem.hidden};
  job.work = call.work;
  job.most = most_hits(problem);
  job.sum = call.sum;
  const bool rounded = call.hidden.dtype == format::Dtype::bf16;
  const u16* tokens = rounded ? reinterpret_cast<const u16*>(call.hidden.data) : call.work.rows;
  const i64 stride = rounded ? call.hidden.stride : problem.hidden;
  Status status = gpu::map_rows({tokens, call.slots.tokens, problem.hidden, stride}, kFewTokens, &job.maps[0]);
  if (!status.ok()) return status;
  const i64 rows = i64{most_hits(problem)} * kFewTokens;
  status = gpu::map_rows({call.work.y, rows, problem.inter, problem.inter}, kFewTokens, &job.maps[1]);
  if (!status.ok()) return status;
  const gpu::LaunchShape shape{multiprocessors, T::kThreads, shared_bytes<T, Layer<T>>(), true};
  return gpu::launch(multiply_tiles<T, Layer<T>>, shape, stream, job);
}

template <int kTile = kWholeTile>
Status launch_shape(int tile, const Whole& call, i32 multiprocessors, void* stream) {
  if constexpr (kTile < kAllTileShapes) {
    if (tile != kTile) return launch_shape<kTile + 1>(tile, call, multiprocessors, stream);
    return launch_layer<kTile>(call, multiprocessors, stream);
  } else {
    return refuse(Reason::internal, "no tile " + std::to_string(tile));
  }
}

}  // namespace

Status launch(const Whole& call, i32 multiprocessors, void* stream) {
  if (call.slots.tokens == 0) return {};
  Status status = gpu::check_rows("hidden_states", call.hidden);
  if (status.ok()) status = gpu::check_rows("output", call.sum.out.output);
  if (status.ok()) status = launch_find(call, stream);
  if (!status.ok()) return status;
  const Problem& problem = call.slots.problem;
  const int tile = call.tile >= 0 ? call.tile : choose_whole(load_of(problem, call.slots.tokens), multiprocessors);
  return launch_shape(tile, call, multiprocessors, stream);
}

}  // namespace fourmoe::sm90
