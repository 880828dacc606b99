// whole on Hopper: the job of the one launch. Roles in tiles.cuh.
#pragma once

#include "backends/sm90/gemm1.cuh"
#include "backends/sm90/gemm2.cuh"
#include "backends/sm90/whole_hits.cuh"
#include "combine/sum.cuh"
#include "gpu/isa/order.cuh"
#include "gpu/numbers.cuh"
#include "route/octets.cuh"

namespace fourmoe::sm90 {

// A hit's row tile as an epilogue sees it.
struct HitPlace {
  int expert;
  int row_tile;
  const Hit* hit;
  int first;        // row of the hit's column 0, where it has one for every column; negative: rows are the picks'
  f32 inter_scale;  // w4a4, of the expert; 0: features stay as they are
  u32 (*largest)[kHitTokens];  // [4] a warp's features by column; two warps share a block

  __device__ bool uses(int column) const { return (hit->columns >> column & 1) != 0; }
  __device__ int row(int column) const { return first >= 0 ? first + column : hit->row[column]; }
  template <class Bits>
  __device__ static void put(Bits* at, Bits bits) {
    gpu::isa::store_relaxed(at, bits);
  }

  // A thread's features of columns 2t and 2t + 1 become E2M1 * E4M3 by blocks of 16: its warp's, or, with a gate, two
  // warps'. They lie as Activate has them.
  __device__ void settle(bool gated, f32 (&d)[4]) const {
    if (inter_scale == 0.0f) return;
    const int warp = gpu::isa::uniform(threadIdx.x % 128 / 32), lane = threadIdx.x % 32;
    u32 most[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      most[c] = max(route::magnitude_of(d[c]), gated ? 0 : route::magnitude_of(d[2 + c]));
      for (int distance = 4; distance < 32; distance *= 2)
        most[c] = max(most[c], __shfl_xor_sync(~0u, most[c], distance));
    }
    if (gated) {
      gpu::isa::sync_some(3 + warp / 2, 64);  // the other warp has read what is there
      if (lane < 4) largest[warp][2 * lane] = most[0], largest[warp][2 * lane + 1] = most[1];
      gpu::isa::sync_some(3 + warp / 2, 64);
#pragma unroll
      for (int c = 0; c < 2; ++c) most[c] = max(most[c], largest[warp ^ 1][lane % 4 * 2 + c]);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const f32 scale = format::from_e4m3(route::block_scale(most[c], inter_scale)), step = scale * inter_scale;
      d[c] = route::requantise(d[c], step, scale);
      if (!gated) d[2 + c] = route::requantise(d[2 + c], step, scale);
    }
  }
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

// kByPick: for picks of a token that want rows of their own, and w4a4, whose y is quantised.
// kSingle: for one token, whose y is numbers that stand for themselves. That of several would take more reads than the
// loading warp has time for: its tiles are reported, and come by boxes.
template <class T, bool kSingle, bool kByPick>
struct Layer : Picker<T, kSingle, kByPick> {
  using Picker = sm90::Picker<T, kSingle, kByPick>;
  using Picker::gemms, Picker::slots, Picker::shared_expert, Picker::many, Picker::shared_hits;
  static_assert(T::kSplit || kHitTokens * T::kDepth <= 32);  // boxes of a stage that are gathered, a lane each
  using Found = typename Picker::Found;
  using Memory = Found;
  using S = Block<T, Found>;
  using Queue = gpu::Queue<gpu::isa::Atomic>;
  CUtensorMap maps[3];  // the tokens, eight rows at once; y, likewise; the tokens, row by row
  Activate<T::kPlanes> activate;
  Project project;
  route::PickRows pick_rows;  // hit by column; none where tokens come as codes
  const f32* inter_scales;    // w4a4, as in DeviceTable; null
  Queue queue;
  i64 wait_cycles;
  combine::DeviceSum sum;

  __device__ const Operands& operands(int width) const { return gemms[width]; }
  // Of gemm1, with more tokens than columns: all but the shared expert's hits, which are of neighbours. Rows of picks
  // lie as their hits take them.
  __device__ bool gathers(const gpu::Tile& tile) const {
    return many() && !by_pick() && tile.width == 0 && tile.slot >= shared_hits();
  }
  __device__ const CUtensorMap& tokens(const gpu::Tile& tile) const { return maps[gathers(tile) ? 2 : tile.width]; }
  __device__ int boxes(const S& shared, const gpu::Tile& tile) const {
    return gathers(tile) ? __popc(shared.job.list[tile.slot].columns) : 1;
  }
  __device__ int box_rows(const gpu::Tile& tile) const { return gathers(tile) ? 1 : kHitTokens; }
  __device__ int first_row(const S& shared, const gpu::Tile& tile, int box) const {
    if (gathers(tile)) return shared.job.list[tile.slot].token[box];
    return tile.width == 1 || many() || by_pick() ? tile.slot * kHitTokens : 0;
  }
  static constexpr bool kReports = true;
  __device__ bool early() const { return true; }
  __device__ void wait_for_first() const { gpu::isa::wait_for_earlier(); }
  __device__ const std::byte* blob(const S& shared, const gpu::Tile& tile) const {
    return shared.job.list[tile.slot].blobs[tile.width];
  }

  // What the call does not change, and zeros.
  __device__ void prepare(S& shared) const {
    Found& found = shared.job;
    if (threadIdx.x == 0) {
      found.late = found.made = false;
      gpu::isa::barrier_init(&found.came, 1);
      found.stored.init(4 * gpu::kArrivals, 1);
    }
    this->prepare_list(shared);
    if (threadIdx.x == 32) {
      for (int map = 0; map < (kSingle ? 1 : many() ? 3 : 2); ++map) gpu::isa::prefetch_map(&maps[map]);
    }
  }

  // Tiles are taken one at a time: whoever comes late takes fewer.
  __device__ void schedule(S& shared) const {
    Found& found = shared.job;
    gpu::Writer<T::kFeed> writer(shared.feed);
    const int blocks1 = row_blocks<T>(gemms[0]), blocks2 = row_blocks<T>(gemms[1]);
    int i = arrive(found);
    gpu::wait(&found.ready, 0);
    const int first = found.hits * blocks1, all = first + found.hits * blocks2;
    bool empty = !kSingle;
    for (; i < all; i = ticket(found.set, writer)) {
      if (!empty && i >= first) await_empty(found), empty = true;  // before the warp that loads tokens polls
      const int width = i < first ? 0 : 1, blocks = width == 0 ? blocks1 : blocks2;
      const int within = width == 0 ? i : i - first;
      const int hit = within / blocks;
      writer.put(0, [&] { return gpu::Tile{width, found.list[hit].expert, within % blocks, hit, 0}; });
    }
    writer.put(0, [] { return gpu::Tile{T::kWidths, 0, 0, 0, 0}; });
  }

  // One warp: a tile of gemm2 needs all of its hit's tiles of gemm1, one of gemm1 the rows of all picks that have any.
  // A wait that is given up is a fault; the tile, and those after it, go on without their tokens, so that nobody waits
  // for them, and are not numbers.
  __device__ void wait(S& shared, const gpu::Tile& tile) const {
    if (tile.width == 0 && by_pick()) await_rows(shared.job);
    if (tile.width == 1) {
      const auto done = [&] { return queue.rows(shared.job.set, tile.slot) >= gemms[0].row_tiles; };
      await(shared.job, gpu::Awaited::tokens, tile.expert, done);
      gpu::isa::fence_copy_engine();  // of this side alone: it lies between their writes and the copies that follow
    }
    __syncwarp();
  }

  // A single token's row of y, 1024 columns at a time. Other rows of the tile are whatever they were: products with
  // them are nobody's.
  __device__ bool brings(const gpu::Tile& tile) const { return tile.width == 1 && kSingle; }
  __device__ void bring(S& shared, const gpu::Tile& tile, gpu::Cursor<T::kStages>* cursor) const {
    constexpr int kPieces = 4 / T::kPlanes, kOfStage = T::kDepth * 8;  // 16 bytes: of a lane at once, of a stage
    const int lane = threadIdx.x % 32, end = gemms[1].steps * 8;
    const u16* y = activate.y + i64{shared.job.list[tile.slot].row[0]} * activate.inter;
    const i64 begin = clock64();
    for (int first = 0; first < end; first += 32 * kPieces) {
      gpu::Pieces<kPieces> planes[T::kPlanes];
#pragma unroll
      for (int plane = 0; plane < T::kPlanes; ++plane) {
        planes[plane] = {first + lane, activate.inter / 8};
        const uint4* row = reinterpret_cast<const uint4*>(y + plane * activate.plane);
        await_since(begin, shared.job, gpu::Awaited::tokens, tile.expert,
                    [&] { return planes[plane].fetch(row, first + lane); });
      }
#pragma unroll
      for (int stage = 0; stage < 32 * kPieces / kOfStage; ++stage) {
        if (first + stage * kOfStage >= end) break;
        gpu::wait(&shared.ring.empty[cursor->stage], cursor->lap ^ 1);
        const u32 to = gpu::isa::shared_address(shared.stages[cursor->stage].tokens[0]);
#pragma unroll
        for (int j = 0; j < kPieces; ++j) {
          const int piece = lane + 32 * j - stage * kOfStage;
          if (piece < 0 || piece >= kOfStage) continue;
          const u32 at = to + piece / 8 * (T::kPlanes * T::kPlaneBytes) + piece % 8 * 16;
#pragma unroll
          for (int plane = 0; plane < T::kPlanes; ++plane) {
            gpu::isa::store_shared_16(at + plane * T::kPlaneBytes, planes[plane].at[j]);
          }
        }
        gpu::isa::fence_async_proxy();
        __syncwarp();
        if (lane == 0) gpu::isa::barrier_arrive(&shared.ring.full[cursor->stage]);
        cursor->advance();
      }
    }
  }

  // One warp, for what takes as long as stores do while nobody else should wait: it empties its part of y and z, and
  // says of each tile of y that it is stored.
  __device__ void report(S& shared) const {
    empty(shared.job);
    gpu::Reader<T::kFeed> reader(shared.feed);
    gpu::Cursor<2> cursor;
    for (gpu::Tile tile = reader.next(); tile.width < T::kWidths; tile = reader.next()) {
      if (tile.width == 1 || kSingle) continue;
      gpu::wait(&shared.job.stored.full[cursor.stage], cursor.lap);
      const int rows = min(T::kRowTiles, gemms[0].row_tiles - tile.row_block * T::kRowTiles);
      if (threadIdx.x % 32 == 0) queue.report_rows(shared.job.set, tile.slot, rows);
      gpu::arrive(&shared.job.stored.empty[cursor.stage]);
      cursor.advance();
    }
  }

  __device__ void begin(S& shared) const { this->find_hits(shared); }

  // The epilogue's warpgroup: every tile's sums, then its share of the output.
  __device__ void finish(S& shared) const {
    finish_list(shared);
    if (by_pick()) make_rows(shared.job);
    gpu::Reader<T::kFeed> reader(shared.feed);
    gpu::Tile tile = reader.next();
    await_empty(shared.job);
    int sum = 0;  // the warp's first
    if (threadIdx.x % 32 == 0) sum = queue.take_sum(shared.job.set);
    for (int turn = 0; tile.width < T::kWidths; tile = reader.next(), ++turn) {
      if (tile.width == 0) finish_tile<0>(shared, turn, tile);
      else finish_tile<1>(shared, turn, tile);
    }
    add_up(shared, sum);
  }

 private:
  __device__ bool by_pick() const { return kByPick && pick_rows.rows != nullptr; }
  // The number of the block's first tile.
  __device__ int arrive(Found& found) const {
    gpu::isa::wait_for_earlier();
    int set = 0, first = 0;
    if (threadIdx.x % 32 == 0) {
      set = found.set = queue.arrive();
      gpu::isa::barrier_arrive(&found.came);
      first = queue.take(set);
    }
    queue.clear_other(gpu::isa::uniform(set), blockIdx.x * 32 + threadIdx.x % 32, gridDim.x * 32);
    return gpu::isa::uniform(first);
  }

  __device__ gpu::Empties empties() const {
    const int rows = slots.tokens * (slots.problem.top_k + (shared_expert ? 1 : 0));
    const int of_y = T::kPlanes * (slots.problem.top_k + 1) * (activate.inter / 8);
    return {reinterpret_cast<uint4*>(activate.y), reinterpret_cast<uint4*>(project.z), kSingle ? of_y : 0,
            rows * (project.hidden / 4)};
  }

  // One warp: a part, and more where fewer blocks than parts have come.
  __device__ void empty(Found& found) const {
    gpu::isa::wait_for_earlier();
    gpu::wait(&found.came, 0);
    const gpu::Empties all = empties();
    const bool leads = threadIdx.x % 32 == 0;
    int part = leads ? queue.take_part(found.set) : 0;
    for (part = gpu::isa::uniform(part); part < all.parts(); part = gpu::isa::uniform(part)) {
      all.empty(part);
      __syncwarp();
      if (leads) queue.report_part(found.set), part = queue.take_part(found.set);
    }
  }

  // One warp.
  __device__ void await_empty(Found& found) const {
    const int parts = empties().parts();
    await(found, gpu::Awaited::empty, 0, [&] { return queue.parts(found.set) >= parts; });
    __syncwarp();
  }

  // Each warp of the epilogue's: pieces of the picks' rows, as long as there are any that nobody took.
  __device__ void make_rows(Found& found) const {
    gpu::isa::wait_for_earlier();
    gpu::wait(&found.came, 0);
    const bool leads = threadIdx.x % 32 == 0;
    const int pieces = pick_rows.pieces(), all = found.hits * pieces;
    int next = leads ? queue.take_piece(found.set) : 0;
    for (int i = gpu::isa::uniform(next); i < all; i = gpu::isa::uniform(next)) {
      if (leads) next = queue.take_piece(found.set);
      const int index = i / pieces;
      const Hit& hit = found.list[index];
      const bool weighs = slots.problem.routing.weight_on_input && index >= shared_hits();  // then top_k is 1
      for (u32 left = hit.columns; left != 0; left &= left - 1) {
        const int column = __ffs(static_cast<int>(left)) - 1, token = hit.token[column];
        const f32 weight = weighs ? found.weight[token] : 1.0f;
        pick_rows.make<T::kPlanes>(token, i % pieces, weight, hit.expert, index * kHitTokens + column);
      }
      __syncwarp();
      if (leads) queue.report_piece(found.set);
    }
  }

  // The warp that loads tokens.
  __device__ void await_rows(Found& found) const {
    if (found.made) return;
    const int all = found.hits * pick_rows.pieces();
    await(found, gpu::Awaited::rows, 0, [&] { return queue.pieces(found.set) >= all; });
    gpu::isa::fence_copy_engine();
    __syncwarp();
    found.made = true;
  }

  // A warp: until done() in all lanes. A wait that is given up ends all waits of the block.
  template <class Done>
  __device__ __forceinline__ void await(Found& found, gpu::Awaited awaited, int of, const Done& done) const {
    await_since(clock64(), found, awaited, of, done);
  }
  template <class Done>
  __device__ __forceinline__ void await_since(i64 begin, Found& found, gpu::Awaited awaited, int of,
                                              const Done& done) const {
    while (!__all_sync(~0u, done()) && !__any_sync(~0u, found.late)) {
      if (clock64() - begin > wait_cycles) give_up(found, awaited, of);
    }
  }

  // How rows of z are read.
  struct Polled {
    const Layer& layer;
    Found& found;
    int token;

    template <int kRows>
    __device__ __forceinline__ void read(const gpu::Columns<2>* column, i64 stride, const i32 (&slot)[kRows],
                                         gpu::Columns<2> (&z)[kRows]) const {
      gpu::Pairs<kRows> pairs(slot);
      layer.await(found, gpu::Awaited::sums, token, [&] { return pairs.fetch(column, stride, slot); });
      const u32 lost = found.late ? gpu::kNone : 0;  // what was not awaited is no number
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        z[i] = {__uint_as_float(pairs.at[i].x | lost), __uint_as_float(pairs.at[i].y | lost)};
      }
    }
    // The shared expert's row is one of them; a caller's is not.
    __device__ __forceinline__ gpu::Columns<2> addend(const gpu::Columns<2>* at) const {
      if (!layer.shared_expert) return *at;
      gpu::Columns<2> z[1];
      read(at, 0, {0}, z);
      return z[0];
    }
  };

  // Each warp of the epilogue's: 64 columns of a token's output, and again, as long as there are any that nobody took.
  __device__ void add_up(S& shared, int next) const {
    combine::DeviceSum of = sum;
    of.pick_slot = shared.job.row;
    of.weights = shared.job.weight;
    const int last = of.hidden / 2 - 1;
    for (int i = gpu::isa::uniform(next); i < gemms[1].row_tiles * of.tokens; i = gpu::isa::uniform(next)) {
      if (threadIdx.x % 32 == 0) next = queue.take_sum(shared.job.set);
      const int token = i % of.tokens, pair = i / of.tokens * 32 + threadIdx.x % 32;
      const Polled rows{*this, shared.job, token};
      const gpu::Columns<2> columns = combine::sum_columns<8, 2>(of, token, min(pair, last), rows);
      if (pair <= last) gpu::store_columns(of.out.output.row(token), of.out.output.dtype, pair, columns);
    }
  }

  // The epilogue's warpgroup: what only its own work needs of the list.
  __device__ void finish_list(S& shared) const {
    Found& found = shared.job;
    gpu::wait(&found.ready, 0);
    for (int hit = threadIdx.x % 128; hit < found.hits; hit += 128) prefetch_globals(found.list[hit].expert);
    for (int token = threadIdx.x % 128 / 32; token < slots.tokens; token += 4) weigh_token(found, token);
    if (blockIdx.x == 0 && found.refused && threadIdx.x % 128 == 0) route::settle_fault(slots);
    gpu::isa::sync_some(1, 128);
  }

  // The epilogues' first reads: of memory they would take a microsecond in which everybody waits for them.
  __device__ void prefetch_globals(int expert) const {
    gpu::isa::prefetch_line(&activate.globals[2 * expert]);
    gpu::isa::prefetch_line(&project.globals[expert]);
    if (kByPick && inter_scales != nullptr) gpu::isa::prefetch_line(&inter_scales[expert]);
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

  __device__ int ticket(int set, gpu::Writer<T::kFeed>& writer) const {
    writer.wait_for_room();
    int taken = 0;
    if (threadIdx.x % 32 == 0) taken = queue.take(set);
    return gpu::isa::uniform(taken);
  }

  __device__ void give_up(Found& found, gpu::Awaited awaited, int of) const {
    const u64 key = gpu::wait_key(awaited, of);
    atomicMin(reinterpret_cast<unsigned long long*>(&slots.fault->first), key);
    found.late = true;
  }

  template <int kWidth>
  __device__ const auto& epilogue() const {
    if constexpr (kWidth == 0) return activate;
    else return project;
  }

  template <int kWidth>
  __device__ __forceinline__ void finish_tile(S& shared, int turn, const gpu::Tile& tile) const {
    const int first = tile.row_block * T::kRowTiles;
    const int rows = min(T::kRowTiles, gemms[kWidth].row_tiles - first);
    const f32 inter_scale = kByPick && kWidth == 0 && inter_scales != nullptr ? inter_scales[tile.expert] : 0.0f;
    const auto place = [&](int r) {
      return HitPlace{tile.expert,
                      first + r,
                      &shared.job.list[tile.slot],
                      kWidth == 0 && !kSingle ? tile.slot * kHitTokens : -1,
                      inter_scale,
                      reinterpret_cast<u32(*)[kHitTokens]>(shared.job.id)};
    };
    const auto scales = epilogue<kWidth>().scales(tile.expert);
    auto lines = epilogue<kWidth>().lines(place(0), scales);  // read while the products are made
    gpu::wait(&shared.handed.ring.full[turn % T::kHanded], turn / T::kHanded & 1);
    for (int r = 0; r < rows; ++r) {
      f32 d[4];
      take_over(shared, turn, r, d);
      if ((kWidth == 1 || by_pick()) && shared.job.late) d[0] = d[1] = d[2] = d[3] = __uint_as_float(0x7fc00000u);
      epilogue<kWidth>().template store<kHitTokens>(place(r), lines, d);
      if (r + 1 < rows) lines = epilogue<kWidth>().lines(place(r + 1), scales);
    }
    __syncwarp();
    gpu::arrive(&shared.handed.ring.empty[turn % T::kHanded]);
    if (kWidth == 1 || kSingle) return;
    gpu::wait(&shared.job.stored.empty[turn % 2], (turn / 2 & 1) ^ 1);  // tiles of y come first
    gpu::arrive(&shared.job.stored.full[turn % 2]);
  }
};

}  // namespace fourmoe::sm90
