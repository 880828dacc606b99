// whole on Hopper, the list of hits: every block picks for all tokens by itself and makes the same list of what picks.
#pragma once

#include "backends/sm90/tiles.cuh"
#include "backends/sm90/whole.h"
#include "gpu/isa/bulk.cuh"
#include "route/pick.cuh"

namespace fourmoe::sm90 {

// An expert and tokens that take it, a column each.
struct Hit {
  const std::byte* blobs[2];  // its packed weights of gemm1 and gemm2, in the GPU's memory; the table's
  i32 expert;                 // entry of the table
  u32 columns;                // bit c: column c is in use
  u16 row[kHitTokens];        // of z, and of a single token's y: that of the pick, of each column in use
  u8 token[kHitTokens];       // likewise
};

inline constexpr int kMostOf = kFewTokens / kHitTokens;     // hits of an expert
inline constexpr int kExpertWords = gpu::kMaxExperts / 32;  // a lane each
static_assert(kExpertWords == 32);

// The tokens that take an expert, a bit each.
struct alignas(8) Takers {
  u32 tokens[kFewTokens / 32];

  __device__ int count() const { return __popc(tokens[0]) + __popc(tokens[1]); }
  __device__ int before(int token) const {
    const u32 below = (1u << token % 32) - 1u;
    return token < 32 ? __popc(tokens[0] & below) : __popc(tokens[0]) + __popc(tokens[1] & below);
  }
};
static_assert(sizeof(Takers::tokens) == 8);

// What a block knows of the call, of up to kPicks picks.
template <int kPicks>
struct Found {
  u64 table;            // barrier: the table of blobs is in shared memory
  u64 ready;            // barrier: the list is made
  u64 came;             // barrier: the set is known
  gpu::Ring<2> stored;  // tiles of y, from the epilogue's warpgroup to the warp that reports them
  i32 set;              // of the queue
  i32 hits;
  bool refused;                        // a token
  bool made;                           // the loading warp has seen that the picks' rows are
  bool late;                           // a wait was given up: what follows is not a number
  u32 experts[kMostOf][kExpertWords];  // bit e: local expert e has that many hits and another
  Hit list[kPicks + kMostOf];  // the shared expert's, then those of experts: ascending, or in the only token's order
  i32 row[kPicks];             // of each pick: its local expert, then, with the list, its row of z; negative for none
  f32 weight[kPicks];
  // What weights are made of, once the list is on its way. Then ids make room for HitPlace::largest.
  i32 id[kPicks];
  f64 score[kPicks];
  route::Scale scale[kFewTokens];
};

// Of pointers, as the copy engine counts: in 16s.
FOURMOE_HD constexpr int bytes_of_table(int experts) { return (experts * 8 + 15) / 16 * 16; }

// The part of a job (whole.cuh: Layer) that picks and lists.
template <class T, bool kSingle, bool kByPick>
struct Picker {
  // find_hits(): beside the table and who takes an expert, a team of as many experts and groups as there can be.
  static constexpr int kPickBytes =
      T::kStages * sizeof(typename T::Stage) - 2 * bytes_of_table(gpu::kMaxExperts + 1) - 8 * gpu::kMaxExperts;
  static_assert(kPickBytes >= 8 * (3 * gpu::kMaxExperts + route::kMaxWarps / 2));
  static constexpr int kPicks = T::kSplit ? kHitTokens * 32 : kFewPicks;  // top_k <= 32
  static constexpr int kPickers = 4 * T::kGroups;                         // warps
  using Found = sm90::Found<kPicks>;
  using S = Block<T, Found>;
  Operands gemms[2];
  route::DeviceSlots slots;
  const u8* refused;   // [tokens] 1: by its scales; null for none
  i32 team_shift;      // 2^team_shift warps pick for a token
  i32 teams;           // at once
  bool screened;       // see route::Team; true where picks are given, too: one warp copies them
  bool shared_expert;  // of all tokens: entry [local_experts] of the table

  // More tokens than columns. Where that cannot be nothing is left of what it takes: few tokens would wait for it.
  __device__ bool many() const { return !T::kSplit && !kSingle && slots.tokens > kHitTokens; }
  __device__ int shared_hits() const { return shared_expert ? (slots.tokens + kHitTokens - 1) / kHitTokens : 0; }

  // All threads: zeros, and the table of blobs on its way.
  __device__ void prepare_list(S& shared) const {
    Found& found = shared.job;
    for (int w = threadIdx.x; w < kExpertWords; w += T::kThreads) found.experts[0][w] = 0;
    for (int e = threadIdx.x; many() && e < gpu::kMaxExperts; e += T::kThreads) takers_of(shared)[e] = {0, 0};
    for (int hit = threadIdx.x; hit < static_cast<int>(std::size(found.list)); hit += T::kThreads)
      found.list[hit].columns = 0;
    if (threadIdx.x != 0) return;
    found.refused = false;
    gpu::isa::barrier_init(&found.ready, (alone() ? 1 : kPickers) * gpu::kArrivals);
    gpu::isa::barrier_init(&found.table, 1);
    gpu::isa::barrier_fence_init();
    fetch_table(shared);
  }

  // The consumers: picks of every token, and of them the list of hits. Every block finds the same, so none waits for
  // another. Look at the multiplying loop after a change here (tests/sass_loops.py): a barrier awaited by one lane
  // alone, or a branch by threadIdx around it all, makes it half again as long (docs/hopper-lab.md).
  __device__ __forceinline__ void find_hits(S& shared) const {
    const int warp = gpu::isa::uniform(threadIdx.x / 32), warps = 1 << team_shift, index = warp >> team_shift;
    const auto sync = [] { gpu::isa::sync_some(2, 32 * kPickers); };
    for (int first = 0; first < slots.tokens; first += teams) {
      const bool real = index < min(teams, slots.tokens - first);
      route::Team team{real ? first + index : -1, warp & (warps - 1), warps, screened, threadIdx.x % 32};
      u64* memory = reinterpret_cast<u64*>(takers_of(shared) + gpu::kMaxExperts);
      if (real) route::place_team(slots.problem, memory, index, &team);
      const route::Choice choice = route::choose(slots, team, sync, [] { gpu::isa::wait_for_earlier(); });
      if (route::has_pick(slots, team)) note(shared, team, choice);
      if (alone()) {
        if (warp == 0) list_token(shared), announce(shared);
        return;
      }
      sync();  // a team's memory is the next one's
    }
    if (many()) {
      count_hits(shared, warp);
      sync();
    }
    gpu::wait(&shared.job.table, 0);
    for (int token = warp; token < slots.tokens; token += kPickers) list_hits(shared, token);
    if (index < teams) gpu::isa::fence_async_proxy();  // whose memory the ring's copies take over
    announce(shared);
  }

  // One warp finds all.
  __device__ bool alone() const { return slots.tokens == 1 && team_shift == 0; }

 private:
  // Memory of the ring, before weights come: [2, table_bytes()] blobs of each GEMM, with many tokens those that take
  // each expert, then the teams'.
  __device__ std::byte* table_of(S& shared) const { return reinterpret_cast<std::byte*>(shared.stages); }
  __device__ int table_bytes() const { return bytes_of_table(gemms[0].experts); }
  __device__ Takers* takers_of(S& shared) const {
    return reinterpret_cast<Takers*>(table_of(shared) + 2 * table_bytes());
  }

  // The table's arrays begin at cache lines and are followed by others, so the last copy may end in what is not its.
  __device__ void fetch_table(S& shared) const {
    const u32 bytes = table_bytes();
    gpu::isa::barrier_expect(&shared.job.table, 2 * bytes);
    gpu::isa::bulk_load(table_of(shared), gemms[0].blobs, bytes, &shared.job.table);
    gpu::isa::bulk_load(table_of(shared) + bytes, gemms[1].blobs, bytes, &shared.job.table);
  }

  __device__ void note(S& shared, const route::Team& team, const route::Choice& choice) const {
    Found& found = shared.job;
    const i64 index = route::pick_index(slots, team);
    const bool bad = choice.id == route::kRefused || (kByPick && refused != nullptr && refused[team.token] != 0);
    const i32 expert = bad ? route::kRefused : route::local_of(slots, choice.id);
    found.row[index] = expert;
    found.id[index] = choice.id;
    found.score[index] = choice.score;
    if (team.lane == 0) found.scale[team.token] = choice.scale;
    if (expert >= 0 && !alone()) take(shared, expert, team.token);
    if (choice.id == route::kRefused) found.refused = true;
    if (blockIdx.x == 0) slots.out.ids[index] = choice.id;
  }

  __device__ void take(S& shared, int expert, int token) const {
    if (many()) atomicOr(&takers_of(shared)[expert].tokens[token / 32], 1u << token % 32);
    else atomicOr(&shared.job.experts[0][expert / 32], 1u << expert % 32);
  }

  // A warp: its part of the list is made.
  __device__ static void announce(S& shared) {
    __syncwarp();
    gpu::arrive(&shared.job.ready);
  }

  // A warp, a lane an expert: every eighth of those that take it begins a hit.
  __device__ void count_hits(S& shared, int warp) const {
    const int lane = threadIdx.x % 32;
    for (int word = warp; word < kExpertWords; word += kPickers) {
      const int takers = takers_of(shared)[32 * word + lane].count();
      for (int hit = 0; hit < kMostOf; ++hit) {
        const u32 experts = __ballot_sync(~0u, takers > hit * kHitTokens);
        if (lane == 0) shared.job.experts[hit][word] = experts;
      }
    }
  }

  // A warp, a lane a pick: its hit, whose number is how many hits experts below have, its column and its row.
  __device__ void list_hits(S& shared, int token) const {
    Found& found = shared.job;
    const int lane = threadIdx.x % 32, first = shared_hits(), index = token * slots.problem.top_k + lane;
    const int of_word = hits_among(found, lane, ~0u);
    int end = of_word;  // inclusive sum over words
    for (int distance = 1; distance < 32; distance *= 2) {
      const int below = __shfl_up_sync(~0u, end, distance);
      if (lane >= distance) end += below;
    }
    const int expert = lane < slots.problem.top_k ? found.row[index] : -1, own = max(expert, 0);
    const int before = __shfl_sync(~0u, end - of_word, own / 32);
    const int hit = first + before + hits_among(found, own / 32, (1u << own % 32) - 1u);
    const int row = token * slots.problem.top_k + __ffs(static_cast<int>(__match_any_sync(~0u, expert))) - 1;
    if (expert >= 0) {
      const int place = many() ? takers_of(shared)[expert].before(token) : token;
      add_hit(shared, hit + place / kHitTokens, expert, place % kHitTokens, token, row);
      found.row[index] = row;
    }
    if (shared_expert && lane == 0) add_shared(shared, token);
    if (token == 0 && lane == 31) found.hits = first + end;
  }

  // Of the experts of a word that are in the mask.
  __device__ int hits_among(const Found& found, int word, u32 mask) const {
    int hits = 0;
    for (int before = 0; before < (many() ? kMostOf : 1); ++before) hits += __popc(found.experts[before][word] & mask);
    return hits;
  }

  // The warp that picked for the only token: its hits in the order of its picks.
  __device__ void list_token(S& shared) const {
    Found& found = shared.job;
    const int lane = threadIdx.x % 32, first = shared_hits();
    const int expert = lane < slots.problem.top_k ? found.row[lane] : -1;
    const u32 same = __match_any_sync(~0u, expert);  // a caller's ids may be
    const int leader = __ffs(static_cast<int>(same)) - 1;
    const u32 leaders = __ballot_sync(~0u, expert >= 0 && lane == leader);
    const int hit = first + __popc(leaders & ((1u << leader) - 1u));
    gpu::wait(&found.table, 0);
    if (expert >= 0 && lane == leader) add_hit(shared, hit, expert, 0, 0, leader);
    if (expert >= 0) found.row[lane] = leader;
    if (shared_expert && lane == 0) add_shared(shared, 0);
    if (lane == 0) found.hits = first + __popc(leaders);
    gpu::isa::fence_async_proxy();
  }

  // Picks have rows of their own, and those of the shared expert follow. An expert picked twice has the first one's.
  __device__ void add_shared(S& shared, int token) const {
    const int row = slots.tokens * slots.problem.top_k + token;
    add_hit(shared, token / kHitTokens, slots.problem.local_experts, token % kHitTokens, token, row);
  }
  __device__ void add_hit(S& shared, int hit, int expert, int column, int token, int row) const {
    Hit& of = shared.job.list[hit];
    for (int gemm = 0; gemm < 2; ++gemm) {
      of.blobs[gemm] = reinterpret_cast<const std::byte* const*>(table_of(shared) + gemm * table_bytes())[expert];
    }
    of.expert = expert;
    of.row[column] = static_cast<u16>(row);
    of.token[column] = static_cast<u8>(token);
    atomicOr(&of.columns, 1u << column);
  }
};

}  // namespace fourmoe::sm90
