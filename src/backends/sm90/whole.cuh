// whole on Hopper: the job of the one launch. Roles in tiles.cuh.
#pragma once

#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm2.cuh"
#include "backends/sm90/whole.h"
#include "combine/sum.cuh"
#include "gpu/isa/order.cuh"
#include "route/pick.cuh"

namespace fourmoe::sm90 {

// An expert that some token takes.
struct Hit {
  const std::byte* blobs[2];  // its packed weights of gemm1 and gemm2, in the GPU's memory; the table's
  i32 expert;                 // entry of the table
  u32 tokens;                 // bit t: token t takes it
};

// Columns are tokens: those that take the expert are in use.
struct HitPlace {
  int expert;
  int row_tile;
  int slot;    // row of y and z of the hit's token 0
  u32 tokens;  // bit t: token t is in use

  __device__ bool uses(int column) const { return (tokens >> column & 1) != 0; }
};

inline constexpr int kMostRowTiles = 8;                     // of a tile
inline constexpr int kExpertWords = gpu::kMaxExperts / 32;  // a lane each
static_assert(kExpertWords == 32);

// What a block knows of the call.
struct Found {
  u64 table;  // barrier: the table of blobs is in shared memory
  u64 ready;  // barrier: the list is made
  i32 set;    // of the queue
  i32 hits;
  bool refused;               // a token
  bool late;                  // a wait was given up: what follows is not a number
  bool last[kMostRowTiles];   // this block's report was the last of the row tile's columns
  u32 experts[kExpertWords];  // bit e: local expert e is hit
  Hit list[kMostHits];        // the shared expert, then the experts hit: ascending, or in the only token's order
  i32 row[kFewTokens * 32];   // of each pick: its local expert, then, with the list, its row of z; negative for none
  f32 weight[kFewTokens * 32];
  // What weights are made of, once the list is on its way.
  i32 id[kFewTokens * 32];
  f64 score[kFewTokens * 32];
  route::Scale scale[kFewTokens];
};

// The epilogue's warpgroup: the sums of row tile r of a tile's block; of groups that split K, in order of the groups.
template <class T>
__device__ __forceinline__ void take_over(const Shared<T>& shared, int turn, int r, f32 (&d)[4]) {
  const auto& sums = shared.handed.sums[turn % T::kHanded];
  float4 sum = sums[r][threadIdx.x % 128];
#pragma unroll
  for (int group = 1; group < (T::kSplit ? T::kGroups : 1); ++group) {
    const float4 other = sums[group][threadIdx.x % 128];
    sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
  }
  d[0] = sum.x, d[1] = sum.y, d[2] = sum.z, d[3] = sum.w;
}

// Of pointers, as the copy engine counts: in 16s.
FOURMOE_HD constexpr int bytes_of_table(int experts) { return (experts * 8 + 15) / 16 * 16; }

template <class T>
struct Layer {
  static_assert(T::kRowTiles <= kMostRowTiles);
  // find_hits(): the table, and a team of as many experts and groups as there can be.
  static constexpr int kPickBytes = T::kStages * sizeof(typename T::Stage) - 2 * bytes_of_table(gpu::kMaxExperts + 1);
  static_assert(kPickBytes >= 8 * (3 * gpu::kMaxExperts + route::kMaxWarps / 2));
  using Memory = Found;
  static constexpr int kPickers = 4 * T::kGroups;  // warps
  using S = Block<T, Found>;
  using Queue = gpu::Queue<gpu::isa::Atomic>;
  CUtensorMap maps[2];  // the tokens; y
  Operands gemms[2];
  Activate<1> activate;
  Project project;
  route::DeviceSlots slots;
  i32 team_shift;  // 2^team_shift warps pick for a token
  i32 teams;       // at once
  bool screened;   // see route::Team; true where picks are given, too: one warp copies them
  bool shared_expert;
  Queue queue;
  i64 wait_cycles;
  combine::DeviceSum sum;

  __device__ const Operands& operands(int width) const { return gemms[width]; }
  __device__ const CUtensorMap& tokens(int width) const { return maps[width]; }
  __device__ int first_row(const gpu::Tile& tile) const { return tile.width == 0 ? 0 : tile.slot; }
  __device__ bool early() const { return true; }
  __device__ const std::byte* blob(const S& shared, const gpu::Tile& tile) const {
    return shared.job.list[tile.slot / kFewTokens].blobs[tile.width];
  }

  // What the call does not change, and zeros.
  __device__ void prepare(S& shared) const {
    Found& found = shared.job;
    for (int w = threadIdx.x; w < kExpertWords; w += T::kThreads) found.experts[w] = 0;
    for (int hit = threadIdx.x; hit < kMostHits; hit += T::kThreads) found.list[hit].tokens = 0;
    if (threadIdx.x == 0) {
      found.refused = found.late = false;
      gpu::isa::barrier_init(&found.ready, 1);
      gpu::isa::barrier_init(&found.table, 1);
      gpu::isa::barrier_fence_init();
      fetch_table(shared);
    }
    if (threadIdx.x == 32) gpu::isa::prefetch_map(&maps[0]), gpu::isa::prefetch_map(&maps[1]);
  }

  // Tiles are taken one at a time: whoever comes late takes fewer.
  __device__ void schedule(S& shared) const {
    Found& found = shared.job;
    gpu::Writer<T::kFeed> writer(shared.feed);
    const int blocks1 = row_blocks<T>(gemms[0]), blocks2 = row_blocks<T>(gemms[1]);
    int i = arrive(found);
    gpu::wait(&found.ready, 0);
    const int first = found.hits * blocks1, all = first + found.hits * blocks2;
    for (; i < all; i = ticket(found.set, writer)) {
      const int width = i < first ? 0 : 1, blocks = width == 0 ? blocks1 : blocks2;
      const int within = width == 0 ? i : i - first;
      const int hit = within / blocks;
      const Hit& of = found.list[hit];
      writer.put(0, [&] {  // its slots are the hit's tokens, as bits
        return gpu::Tile{width, of.expert, within % blocks, hit * kFewTokens, static_cast<i32>(of.tokens)};
      });
    }
    writer.put(0, [] { return gpu::Tile{T::kWidths, 0, 0, 0, 0}; });
  }

  // One warp: a tile of gemm2 needs all of its hit's tiles of gemm1. A wait that is given up is a fault; the tile, and
  // those after it, go on without their tokens, so that nobody waits for them, and are not numbers.
  __device__ void wait(S& shared, const gpu::Tile& tile) const {
    if (tile.width == 1) {
      const i64 begin = clock64();
      const int hit = tile.slot / kFewTokens;
      i32 rows = 0;
      while ((rows = queue.rows(shared.job.set, hit)) < gemms[0].row_tiles && !shared.job.late) {
        if (clock64() - begin > wait_cycles) give_up(shared.job, tile.expert, rows);
      }
      gpu::isa::fence_copy_engine();  // of this side alone: it lies between their writes and the copies that follow
    }
    __syncwarp();
  }

  __device__ void begin(S& shared) const { find_hits(shared); }

  // The epilogue's warpgroup: every tile's sums, and of the columns that this block was the last to bring, the output.
  __device__ void finish(S& shared) const {
    finish_list(shared);
    gpu::Reader<T::kFeed> reader(shared.feed);
    int turn = 0;
    for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next(), ++turn) {
      if (tile.width == 0) finish_tile<0>(shared, turn, tile);
      else finish_tile<1>(shared, turn, tile);
    }
    if (shared.job.hits > 0) return;  // without a hit nobody has written the output
    for (int row_tile = blockIdx.x; row_tile < gemms[1].row_tiles; row_tile += gridDim.x) add_up(shared, row_tile);
  }

 private:
  // Memory of the ring, before weights come: [2, table_bytes()] blobs of each GEMM, then the teams'.
  __device__ std::byte* table_of(S& shared) const { return reinterpret_cast<std::byte*>(shared.stages); }
  __device__ int table_bytes() const { return bytes_of_table(gemms[0].experts); }

  // The table's arrays begin at cache lines and are followed by others, so the last copy may end in what is not its.
  __device__ void fetch_table(S& shared) const {
    const u32 bytes = table_bytes();
    gpu::isa::barrier_expect(&shared.job.table, 2 * bytes);
    gpu::isa::bulk_load(table_of(shared), gemms[0].blobs, bytes, &shared.job.table);
    gpu::isa::bulk_load(table_of(shared) + bytes, gemms[1].blobs, bytes, &shared.job.table);
  }

  // The number of the block's first tile.
  __device__ int arrive(Found& found) const {
    gpu::isa::wait_for_earlier();
    int set = 0, first = 0;
    if (threadIdx.x % 32 == 0) {
      set = queue.arrive();
      first = queue.take(set);
      found.set = set;
    }
    queue.clear_other(gpu::isa::uniform(set), blockIdx.x * 32 + threadIdx.x % 32, gridDim.x * 32);
    return gpu::isa::uniform(first);
  }

  // The consumers: picks of every token, and of them the list of hits. Every block finds the same, so none waits for
  // another. Look at the multiplying loop after a change here (tests/sass_loops.py): a barrier awaited by one lane
  // alone, or a branch by threadIdx around it all, makes it half again as long (docs/hopper.md).
  __device__ __forceinline__ void find_hits(S& shared) const {
    const int warp = gpu::isa::uniform(threadIdx.x / 32), warps = 1 << team_shift, index = warp >> team_shift;
    const auto sync = [] { gpu::isa::sync_some(2, 32 * kPickers); };
    for (int first = 0; first < slots.tokens; first += teams) {
      const bool real = index < min(teams, slots.tokens - first);
      route::Team team{real ? first + index : -1, warp & (warps - 1), warps, screened, threadIdx.x % 32};
      u64* memory = reinterpret_cast<u64*>(table_of(shared) + 2 * table_bytes());
      if (real) route::place_team(slots.problem, memory, index, &team);
      const route::Choice choice = route::choose(slots, team, sync, [] { gpu::isa::wait_for_earlier(); });
      if (route::has_pick(slots, team)) note(shared.job, team, choice);
      if (alone()) {
        if (warp == 0) list_token(shared);
        return;
      }
      sync();  // a team's memory is the next one's
    }
    gpu::wait(&shared.job.table, 0);
    for (int token = warp; token < slots.tokens; token += kPickers) list_hits(shared, token);
    if (index < teams) gpu::isa::fence_async_proxy();  // whose memory the ring's copies take over
    sync();
    if (threadIdx.x == 0) gpu::isa::barrier_arrive(&shared.job.ready);
  }

  // One warp finds all.
  __device__ bool alone() const { return slots.tokens == 1 && team_shift == 0; }

  // The epilogue's warpgroup: what only its own work needs of the list.
  __device__ void finish_list(S& shared) const {
    Found& found = shared.job;
    gpu::wait(&found.ready, 0);
    for (int hit = threadIdx.x % 128; hit < found.hits; hit += 128) prefetch_globals(found.list[hit].expert);
    for (int token = threadIdx.x % 128 / 32; token < slots.tokens; token += 4) weigh_token(found, token);
    if (blockIdx.x == 0 && found.refused && threadIdx.x % 128 == 0) route::settle_fault(slots);
    gpu::isa::sync_some(1, 128);
  }

  __device__ void note(Found& found, const route::Team& team, const route::Choice& choice) const {
    const i64 index = route::pick_index(slots, team);
    const i32 expert = route::local_of(slots, choice.id);
    found.row[index] = choice.id == route::kRefused ? route::kRefused : expert;
    found.id[index] = choice.id;
    found.score[index] = choice.score;
    if (team.lane == 0) found.scale[team.token] = choice.scale;
    if (expert >= 0 && !alone()) atomicOr(&found.experts[expert / 32], 1u << expert % 32);
    if (choice.id == route::kRefused) found.refused = true;
    if (blockIdx.x == 0) slots.out.ids[index] = choice.id;
  }

  // The epilogues' first reads: of memory they would take a microsecond in which everybody waits for them.
  __device__ void prefetch_globals(int expert) const {
    gpu::isa::prefetch_line(&activate.globals[2 * expert]);
    gpu::isa::prefetch_line(&project.globals[expert]);
  }

  // A warp, a lane a pick.
  __device__ void weigh_token(Found& found, int token) const {
    const int lane = threadIdx.x % 32, index = token * slots.problem.top_k + lane;
    const bool has = lane < slots.problem.top_k;
    const route::Choice choice = {has ? found.id[index] : -1, has ? found.score[index] : 0.0, found.scale[token]};
    const f32 weight = route::weigh_choice(slots, token, choice).weight;
    if (!has) return;
    found.weight[index] = weight;
    if (blockIdx.x == 0) slots.out.weights[index] = weight;
  }

  // A warp, a lane a pick: its hit, whose number is how many experts below are hit, and its row.
  __device__ void list_hits(S& shared, int token) const {
    Found& found = shared.job;
    const int lane = threadIdx.x % 32, first = shared_expert ? 1 : 0, index = token * slots.problem.top_k + lane;
    const u32 word = found.experts[lane];
    int end = __popc(word);  // inclusive sum over words
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += below;
    }
    const int expert = lane < slots.problem.top_k ? found.row[index] : -1, own = max(expert, 0);
    const int before = __shfl_sync(~0u, end - __popc(word), own / 32);
    const u32 here = __shfl_sync(~0u, word, own / 32);
    const int hit = first + before + __popc(here & ((1u << own % 32) - 1u));
    if (expert >= 0) {
      add_hit(shared, hit, expert, 1u << token);
      found.row[index] = hit * kFewTokens + token;
    }
    if (token > 0) return;
    if (shared_expert && lane == 0) add_hit(shared, 0, slots.problem.local_experts, (1u << slots.tokens) - 1u);
    if (lane == 31) found.hits = first + end;
  }

  // The warp that picked for the only token: its hits in the order of its picks. Ends with the list announced.
  __device__ void list_token(S& shared) const {
    Found& found = shared.job;
    const int lane = threadIdx.x % 32, first = shared_expert ? 1 : 0;
    const int expert = lane < slots.problem.top_k ? found.row[lane] : -1;
    const u32 same = __match_any_sync(~0u, expert);  // a caller's ids may be
    const int leader = __ffs(static_cast<int>(same)) - 1;
    const u32 leaders = __ballot_sync(~0u, expert >= 0 && lane == leader);
    const int hit = first + __popc(leaders & ((1u << leader) - 1u));
    gpu::wait(&found.table, 0);
    if (expert >= 0 && lane == leader) add_hit(shared, hit, expert, 1u);
    if (expert >= 0) found.row[lane] = hit * kFewTokens;
    if (shared_expert && lane == 0) add_hit(shared, 0, slots.problem.local_experts, 1u);
    if (lane == 0) found.hits = first + __popc(leaders);
    gpu::isa::fence_async_proxy();
    __syncwarp();
    if (lane == 0) gpu::isa::barrier_arrive(&found.ready);
  }

  __device__ void add_hit(S& shared, int hit, int expert, u32 tokens) const {
    Hit& of = shared.job.list[hit];
    for (int gemm = 0; gemm < 2; ++gemm) {
      of.blobs[gemm] = reinterpret_cast<const std::byte* const*>(table_of(shared) + gemm * table_bytes())[expert];
    }
    of.expert = expert;
    atomicOr(&of.tokens, tokens);
  }

  __device__ int ticket(int set, gpu::Writer<T::kFeed>& writer) const {
    writer.wait_for_room();
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = queue.take(set);
    return gpu::isa::uniform(taken);
  }

  __device__ void give_up(Found& found, int expert, i32 rows) const {
    const u64 key = gpu::fault_key(gpu::FaultKind::wait, 0, expert, static_cast<u8>(min(max(rows, 0), 255)));
    atomicMin(reinterpret_cast<unsigned long long*>(&slots.fault->first), key);
    found.late = true;
  }

  template <int kWidth>
  __device__ __forceinline__ void finish_tile(S& shared, int turn, const gpu::Tile& tile) const {
    const int first = tile.row_block * T::kRowTiles;
    const int rows = min(T::kRowTiles, gemms[kWidth].row_tiles - first);
    gpu::wait(&shared.handed.ring.full[turn % T::kHanded], turn / T::kHanded & 1);
    for (int r = 0; r < rows; ++r) {
      f32 d[4];
      take_over(shared, turn, r, d);
      const HitPlace place{tile.expert, first + r, tile.slot, static_cast<u32>(tile.slots)};
      if constexpr (kWidth == 0) {
        activate.template store<kFewTokens>(place, d);
      } else {
        if (shared.job.late) d[0] = d[1] = d[2] = d[3] = __uint_as_float(0x7fc00000u);
        project.template store<kFewTokens>(place, d);
      }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) gpu::isa::barrier_arrive(&shared.handed.ring.empty[turn % T::kHanded]);
    if constexpr (kWidth == 0) report(shared.job, tile.slot / kFewTokens, rows);
    else report_columns(shared, first, rows);
  }

  // The warpgroup has stored `rows` row tiles of a hit's y.
  __device__ void report(const Found& found, int hit, int rows) const {
    gpu::isa::sync_some(1, 128);
    if (threadIdx.x % 128 == 0) queue.report_rows(found.set, hit, rows);
  }

  // The warpgroup has stored a hit's row tiles of z: those that no other hit is missing are added up.
  __device__ void report_columns(S& shared, int first, int rows) const {
    Found& found = shared.job;
    const int thread = threadIdx.x % 128;
    gpu::isa::sync_some(1, 128);
    if (thread < rows) found.last[thread] = queue.report_columns(found.set, first + thread, found.hits);
    gpu::isa::sync_some(1, 128);
    for (int r = 0; r < rows; ++r) {
      if (found.last[r]) add_up(shared, first + r);
    }
  }

  // The warpgroup: 64 columns of the output, a warp a token.
  __device__ void add_up(const S& shared, int row_tile) const {
    combine::DeviceSum of = sum;
    of.pick_slot = shared.job.row;
    of.weights = shared.job.weight;
    const int pair = row_tile * 32 + threadIdx.x % 32;
    const int last = of.hidden / 2 - 1;
    for (int token = threadIdx.x % 128 / 32; token < of.tokens; token += 4) {
      const gpu::Columns<2> columns = combine::sum_columns<8, 2>(of, token, min(pair, last));
      if (pair <= last) gpu::store_columns(of.out.output.row(token), of.out.output.dtype, pair, columns);
    }
  }
};

}  // namespace fourmoe::sm90
