#include "combine/combine.h"

#include <algorithm>

#include "args.h"

namespace fourmoe::combine {
namespace {

constexpr i64 kTokensPerTask = 4;  // 4 tokens x 8 picks x 7168 columns are under a megabyte

constexpr i64 kPatch = 256;  // columns summed over all picks at a time: as many streams as picks, 1 KB each

// acc[0..count) += weight * z. Plain loops: this file is compiled to turn them into vectors.
void add(f32 weight, const f32* __restrict z, i64 count, f32* __restrict acc) {
  for (i64 h = 0; h < count; ++h) acc[h] += weight * z[h];
}

void prefetch(const f32* z, i64 count) {
  for (i64 h = 0; h < count; h += 16) __builtin_prefetch(z + h);
}

void write(const f32* acc, format::Dtype dtype, i64 first, i64 count, u8* row) {
  if (dtype == format::Dtype::bf16) {
    for (i64 h = 0; h < count; ++h) {
      const u16 value = format::to_bf16(acc[h]);
      std::memcpy(row + 2 * (first + h), &value, 2);
    }
    return;
  }
  for (i64 h = 0; h < count; ++h) format::write(row, dtype, first + h, acc[h]);
}

// Columns [first, first + count) of a token.
void combine_patch(const Args& args, i64 token, i64 first, i64 count) {
  const Problem& problem = *args.problem;
  f32 acc[kPatch];
  if (args.addend.addend != nullptr) std::copy_n(args.addend.addend + token * problem.hidden + first, count, acc);
  else std::fill_n(acc, count, 0.0f);
  const i64 next = std::clamp<i64>(problem.hidden - first - kPatch, 0, kPatch);
  for (i64 pick = token * problem.top_k; pick < (token + 1) * problem.top_k; ++pick) {
    const i64 slot = args.slots.pick_slot[pick];
    if (slot < 0) continue;
    const f32* z = args.partial.rows + slot * problem.hidden + first;
    prefetch(z + kPatch, next);
    add(problem.routing.weight_on_input ? 1.0f : args.slots.weights[pick], z, count, acc);
  }
  write(acc, args.output.output.dtype, first, count, args.output.output.row(token));
}

void combine_token(const Args& args, i64 token) {
  const i64 hidden = args.problem->hidden;
  for (i64 first = 0; first < hidden; first += kPatch) {
    combine_patch(args, token, first, std::min(kPatch, hidden - first));
  }
}

Status run_step(const Bound& bound) {
  const Args& args = *bound.args;
  args.executor->parallel_for((args.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](i64 task) {
    const i64 end = std::min<i64>(args.tokens, (task + 1) * kTokensPerTask);
    for (i64 token = task * kTokensPerTask; token < end; ++token) combine_token(args, token);
  });
  return {};
}

}  // namespace

extern const Step kHostStep;
const Step kHostStep = {"host",
                        "combine",
                        {Stage::combine, Stage::combine},
                        [](const Problem&, const Machine&) { return accept(); },
                        [](const Problem&, const Machine&) { return i64{0}; },
                        run_step};

}  // namespace fourmoe::combine
