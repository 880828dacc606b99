// route on a device: the contracts of route.h over device memory.
//
// Launches only enqueue: nothing is allocated, nothing waits for the host, and a captured launch follows what the
// buffers hold at each replay. Results are the host's, bit for bit, except that exp and log1p are the device's: a
// weight may differ by one ulp of f32, and a choice between two experts whose scores agree to 1e-15 (never when their
// logits and biases are equal: then the lower id wins on both). A refused token (gpu/fault.h) has kRefused for all its
// picks, in ids and in pick_slot, and weights of 0.
#pragma once

#include "route/route.h"

namespace fourmoe {
namespace gpu {
struct Fault;  // gpu/fault.h
}

namespace route {

inline constexpr i32 kRefused = -2;  // an id, and a pick's slot, of a token that was refused

// All pointers are device memory of the caller's.
struct DeviceLogits {
  format::Tensor hidden;      // [tokens, hidden] f32|f16|bf16; rows begin at multiples of 16 bytes
  format::Tensor router;      // [experts, hidden] f32|f16|bf16; likewise
  const f32* bias = nullptr;  // [experts]; null for none
  f32* logits = nullptr;      // [tokens, experts], overwritten
};

// Sums are f64 in an order that depends on nothing but hidden: a token's logits do not depend on the batch.
Status launch_logits(const DeviceLogits& args, void* stream);

struct DeviceSlots {
  Problem problem;
  i32 tokens = 0;  // <= problem.max_tokens
  In in;           // device pointers
  Out out;         // device pointers; codes and scales unused
  gpu::Fault* fault = nullptr;
  u32* chunk_counts = nullptr;  // [sort_scratch_bytes]; nothing in it is kept between calls
};

inline constexpr i32 kMaxChunks = 128;  // of a call: every block reads the counts of all chunks

// Bytes of DeviceSlots::chunk_counts for problem.max_tokens.
i64 sort_scratch_bytes(const Problem& problem);

// Picks, then slots: one launch for as many tokens as one cluster picks at once, or one block takes from the caller,
// else three.
Status launch_slots(const DeviceSlots& args, void* stream);

inline constexpr i32 kFewTokens = 128;

// The parts of launch_slots for any number of picks.
Status launch_pick(const DeviceSlots& args, void* stream);
Status launch_sort(const DeviceSlots& args, void* stream);

// Tokens to slots.
struct DeviceTokens {
  Problem problem;
  i32 tokens = 0;
  format::Tensor hidden;              // [tokens, hidden] f32|f16|bf16; rows begin at multiples of 16 bytes
  Out slots;                          // of launch_slots; codes and scales unused
  const f32* input_scales = nullptr;  // [local_experts] weights::Expert::input_scale; w4a4
  // [slots, hidden] bf16, overwritten: w4a16 the rounded tokens, w4a4 E2M1 * E4M3. w4a16 of f16: [2, max_tokens *
  // top_k, hidden], two planes that sum to the tokens.
  u16* rows = nullptr;

  // launch_decode alone:
  format::Tensor hidden_scales;  // [tokens, hidden/16] u8 E4M3, any alignment; hidden is then [tokens, hidden/2] u8
  gpu::Fault* fault = nullptr;
};

// w4a16: each slot's token, rounded to problem.activations, times the routing weight and rounded again where that
// weighs the input.
Status launch_gather(const DeviceTokens& args, void* stream);

// w4a4: the numbers of each slot's token in NVFP4, those of route::quantise's codes and scales (exact in bf16; zeros
// are positive), times the routing weight before where that weighs the input; top_k is 1 then (flow.h).
Status launch_quantise(const DeviceTokens& args, void* stream);

// w4a4 of tokens that come quantised: their codes and scales decoded to rows of bf16 (exact). A token with a scale that
// is NaN or negative is refused: its pick_slot becomes kRefused and its rows are not written, its ids and weights stay.
Status launch_decode(const DeviceTokens& args, void* stream);

// Rows of slots, f32, to NVFP4 with a global scale each expert: the intermediate of w4a4.
struct DeviceRows {
  Problem problem;
  i32 tokens = 0;
  i32 columns = 0;               // problem.inter
  const f32* values = nullptr;   // [slots, columns] f32
  Out slots;                     // of launch_slots; codes and scales unused
  const f32* globals = nullptr;  // [local_experts] weights::Expert::inter_scale
  u16* rows = nullptr;           // [slots, columns] bf16 E2M1 * E4M3, zeros positive, overwritten
};

Status launch_quantise_rows(const DeviceRows& args, void* stream);

}  // namespace route
}  // namespace fourmoe
