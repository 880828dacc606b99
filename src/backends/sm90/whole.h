// whole on Hopper: a layer for few tokens in one launch, as the host sees it.
//
// Every block picks for all tokens by itself, so none waits for another before its first weights are on their way. A
// hit is an expert and up to eight of the tokens that picked it, the columns of its products. Up to eight tokens in all
// are the columns of every hit, so nothing is gathered, and those of the tokens that picked it are stored; of more, the
// copy engine gathers each hit's own, row by row. Where picks of a token want rows of their own, blocks first make
// them, hit by column, in pieces. The layer's shared expert is hit by all tokens, eight at a time. Tiles of both GEMMs
// stand in one queue (gpu/queue.h); a tile of gemm2 waits for its own hit's tiles of gemm1 while its weights are on the
// way, and when no tiles are left blocks share out the output, 64 columns of a token at a time, whose rows of z they
// add up in the order of picks as these come. z, and the y of a single token, are polled number by number
// (gpu/numbers.cuh); a hit's y of several tokens has a counter, for there the copy engine brings it.
#pragma once

#include "backends/sm90/tiles.h"
#include "combine/device.h"
#include "gpu/queue.h"
#include "route/device.h"
#include "weights/expert_table.h"

namespace fourmoe::sm90 {

inline constexpr i32 kHitTokens = 8;                                   // columns of a product
inline constexpr i32 kFewTokens = 64;                                  // of a call
inline constexpr i32 kFewPicks = 512;                                  // likewise
inline constexpr i32 kMostHits = kFewPicks + kFewTokens / kHitTokens;  // a token each, and the shared expert's

// Device memory of the step, for calls of up to problem.max_tokens.
struct Work {
  i32* queue = nullptr;  // [queue_shape().words()] zeros before the first of the launches that share it
  // [planes, max_tokens, hidden] bf16, f16 in two planes: tokens that do not come so; where picks have rows of their
  // own [planes, most_hits * kHitTokens, hidden], hit by column
  u16* rows = nullptr;
  u8* refused = nullptr;  // [max_tokens] w4a4: 1 where scales of a token that comes quantised are
  u16* y = nullptr;  // [planes, most_hits * kHitTokens, inter] hit by column; one token's [planes, top_k + 1, inter]
  f32* z = nullptr;  // [most_rows, hidden]
};

// Picks of a token want rows of their own: in w4a4 an expert's input scale, or the routing weight on the input.
bool has_pick_rows(const Problem& problem);
i32 most_hits(const Problem& problem);
gpu::QueueShape queue_shape(i32 multiprocessors);  // one for calls of any size
i32 most_rows(const Problem& problem);             // one for each pick, then one of each token for the shared expert
LayerLoad load_of(const Problem& problem, i64 tokens);  // chooses the tile

struct Whole {
  route::DeviceSlots slots;      // out.ids and out.weights are written
  format::Tensor hidden;         // [tokens, hidden] f32|f16|bf16, or [tokens, hidden/2] u8 codes; caller's
  format::Tensor hidden_scales;  // of codes, [tokens, hidden/16] u8; else empty
  const weights::DeviceTable* table = nullptr;  // the layer's
  Work work;
  bool clears = false;     // work.queue is nobody's between calls: a launch before the one clears it
  bool shared = false;     // entry [local_experts] of the table is an expert that all tokens take
  combine::DeviceSum sum;  // all but pick_slot, weights and rows; addend too where a shared expert is asked for
  i32 tile = -1;           // of kTileShapes; -1: chosen
  i64 wait_cycles = gpu::kQueueCycles;
};

// Enqueues; does not wait. multiprocessors: of the device.
Status launch(const Whole& call, i32 multiprocessors, void* stream);

}  // namespace fourmoe::sm90
