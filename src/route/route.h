// route: from router logits, or from the caller's picks, to slots.
//
// A pick is one (token, expert) choice; a slot is a row of the experts' GEMMs, and slots are sorted by expert, within
// an expert by pick. Formulas (E experts, logits l, selection bias b):
//   s_e = softmax(l)_e | sigmoid(l_e) | sqrt(log(1 + exp(l_e))) | l_e
//   c_e = s_e + b_e                                    the bias selects and never weighs
//   groups: group score = sum of its best `group_best` c; experts outside the best `groups_kept` groups are out
//           (-infinity, not 0: a negative bias would make 0 attractive)
//   picks  = the top_k largest c, ties to the lower expert id, in descending order of c
//   w_p    = s_p [ / (sum of the picks' s + 1e-20) ] * scale
// Sources: the DeepSeek-V3 reference for groups, bias and epsilon; "top-k, then softmax over the picks" (Mixtral,
// gpt-oss) is softmax with renormalise, to which it is equal. Everything is computed in f64 from f32 logits.
#pragma once

#include <span>

#include "executor.h"
#include "flow.h"

namespace fourmoe::route {

// The caller's, but for logits of the layer's own router. Either logits, or ids and weights; the others are empty.
struct In {
  format::Tensor logits;      // [tokens, experts] f32|f16|bf16
  format::Tensor ids;         // [tokens, top_k] i32|i64: expert of the whole layer, or -1 for no pick
  format::Tensor weights;     // [tokens, top_k] f32|f16|bf16, final: neither renormalised nor scaled
  const f32* bias = nullptr;  // [experts] selection bias b; the layer's; null for none
};

// Memory of the caller's where it wants the picks; null for nowhere. Overwritten.
struct Picked {
  i32* ids = nullptr;      // [tokens, top_k]
  f32* weights = nullptr;  // [tokens, top_k]
};

// A word for each local expert, and one for each GEMM.
constexpr i64 progress_words(i32 local_experts) { return i64{local_experts} + 2; }

// In the workspace, sized for max_tokens, but that ids and weights are Picked's where it has them. Overwritten. A slot
// exists for every pick of a local expert.
struct Out {
  i32* ids = nullptr;           // [tokens, top_k] expert of each pick, -1 for none
  f32* weights = nullptr;       // [tokens, top_k]; 0 where the id is -1
  i32* expert_begin = nullptr;  // [local_experts + 1] first slot of each local expert; last = slots in use
  i32* slot_pick = nullptr;     // [slots] token * top_k + position of the pick
  i32* pick_slot = nullptr;     // [tokens, top_k] slot of the pick, -1 where it is skipped or not local
  u8* codes = nullptr;          // [slots, hidden/2] E2M1 pairs, low nibble first: tokens in w4a4; null on a GPU
  u8* scales = nullptr;         // [slots, hidden/16] E4M3 of the codes; null where they are
  u16* rows = nullptr;          // [slots, hidden] bf16: each slot's token as gemm1 multiplies it, in w4a4 the exact
                                // values of codes and scales without their global; null unless the plan is for a
                                // GPU. w4a16 of f16: two planes of max_tokens * top_k slots that sum to the tokens
  u64* progress = nullptr;      // [progress_words] zeros, in which GEMMs of a GPU count; null where none does
};

// What is said of a token that is refused, on the host and on a device: by pick, and for the scales of one that comes
// quantised.
Status refuse_logits(i32 token);
Status refuse_id(i32 token, i32 position, i64 id, i32 experts);
Status refuse_scale(i64 token, i64 block, u8 byte);

// Refuses a selection bias that is not finite, before calls: a NaN has no place in an order, so which experts are
// picked beside it would be chance.
Status check_bias(std::span<const f32> bias);

// Picks of every token. Reads In, writes Out::ids and Out::weights. Refuses NaN logits and ids out of range, naming the
// token and the value.
Status pick(const Problem& problem, const In& in, i32 tokens, Executor& executor, const Out& out);

// Slots of all picks. Reads Out::ids, writes expert_begin, slot_pick, pick_slot (on a device progress, too).
void sort(const Problem& problem, i32 tokens, const Out& out);

// l = x * router^T (+ bias), accumulated in f64 without intermediate rounding.
// hidden [tokens, H], router [E, H] with any dense encoding, bias [E] or null, logits [tokens, E] f32, overwritten.
void logits(const format::Tensor& hidden, const format::Matrix& router, const f32* bias, Executor& executor,
            f32* logits);

// Each slot's token to NVFP4 for w4a4, with its expert's input scale; the routing weight first where it multiplies the
// input. Reads Out's slots, writes Out::codes and Out::scales.
void quantise(const Args& args);

}  // namespace fourmoe::route
