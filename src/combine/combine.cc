#include "combine/combine.h"

#include <algorithm>
#include <vector>

#include "args.h"

namespace fourmoe::combine {
namespace {

constexpr i64 kTokensPerTask = 4;  // 4 tokens x 8 picks x 7168 columns are under a megabyte

// acc[0..hidden) += weight * z. Plain loops: this file is compiled to turn them into vectors.
void add(f32 weight, const f32* __restrict z, i64 hidden, f32* __restrict acc) {
  for (i64 h = 0; h < hidden; ++h) acc[h] += weight * z[h];
}

void write_row(const f32* acc, format::Dtype dtype, i64 hidden, u8* row) {
  if (dtype == format::Dtype::bf16) {
    for (i64 h = 0; h < hidden; ++h) {
      const u16 value = format::to_bf16(acc[h]);
      std::memcpy(row + 2 * h, &value, 2);
    }
    return;
  }
  for (i64 h = 0; h < hidden; ++h) format::write(row, dtype, h, acc[h]);
}

void combine_token(const Args& args, i64 token, f32* acc) {
  const Problem& problem = *args.problem;
  const i64 hidden = problem.hidden;
  if (args.addend.addend != nullptr) std::copy_n(args.addend.addend + token * hidden, hidden, acc);
  else std::fill_n(acc, hidden, 0.0f);
  for (i64 pick = token * problem.top_k; pick < (token + 1) * problem.top_k; ++pick) {
    const i64 slot = args.slots.pick_slot[pick];
    if (slot < 0) continue;
    const f32 weight = problem.routing.weight_on_input ? 1.0f : args.slots.weights[pick];
    add(weight, args.partial.rows + slot * hidden, hidden, acc);
  }
  write_row(acc, args.output.output.dtype, hidden, args.output.output.row(token));
}

Status run_step(const Bound& bound) {
  const Args& args = *bound.args;
  args.executor->parallel_for((args.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](i64 task) {
    std::vector<f32> acc(args.problem->hidden);
    const i64 end = std::min<i64>(args.tokens, (task + 1) * kTokensPerTask);
    for (i64 token = task * kTokensPerTask; token < end; ++token) combine_token(args, token, acc.data());
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
