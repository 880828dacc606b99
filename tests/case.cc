#include "case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "mirror.h"

namespace fourmoe::cases {
namespace {

using format::Dtype;
using format::Encoding;

using Random = std::mt19937_64;

// Everything that a random layer's views point into.
struct Memory {
  std::vector<std::vector<u8>> bytes;
  std::vector<std::vector<f32>> floats;
};

u8* take_bytes(Memory* memory, i64 count) { return memory->bytes.emplace_back(count).data(); }

// E4M3 scales of 2^-3 .. 2^2 with all mantissas; E8M0 scales of 2^-3 .. 2^2.
u8 random_scale(Encoding encoding, Random* random) {
  if (encoding == Encoding::mxfp4) return static_cast<u8>(124 + (*random)() % 6);
  return static_cast<u8>((4 + (*random)() % 6) << 3 | (*random)() % 8);
}

void fill_dense(Encoding encoding, i64 count, f32 sigma, Random* random, u8* out) {
  std::normal_distribution<f32> normal(0.0f, sigma);
  for (i64 i = 0; i < count; ++i) {
    const f32 value = normal(*random);
    switch (encoding) {
      case Encoding::f32: format::write(out, Dtype::f32, i, value); break;
      case Encoding::f16: format::write(out, Dtype::f16, i, value); break;
      case Encoding::bf16: format::write(out, Dtype::bf16, i, value); break;
      default: out[i] = format::to_e4m3(value);
    }
  }
}

// Root mean square of random code times random scale as drawn above, measured once over both tables.
constexpr f32 kRandomRms = 5.9f;

format::Matrix random_matrix(Encoding encoding, i32 rows, i32 cols, f32 factor, Random* random, Memory* memory) {
  format::Matrix matrix;
  matrix.rows = rows;
  matrix.cols = cols;
  matrix.encoding = encoding;
  matrix.data_stride = format::row_bytes(encoding, cols);
  u8* data = take_bytes(memory, rows * matrix.data_stride);
  matrix.data = data;
  const f32 sigma = factor / std::sqrt(static_cast<f32>(cols));
  if (!format::is_fp4(encoding)) {
    // FP8's step is 2^-9 near zero: its values are drawn at unit size and its global brings them down.
    fill_dense(encoding, i64{rows} * cols, encoding == Encoding::fp8 ? 1.0f : sigma, random, data);
    matrix.global = encoding == Encoding::fp8 ? sigma : 1.0f;
    return matrix;
  }
  std::generate_n(data, rows * matrix.data_stride, [&] { return static_cast<u8>((*random)()); });
  matrix.scales_stride = cols / format::block_of(encoding);
  u8* scales = take_bytes(memory, rows * matrix.scales_stride);
  std::generate_n(scales, rows * matrix.scales_stride, [&] { return random_scale(encoding, random); });
  matrix.scales = scales;
  matrix.global = encoding == Encoding::nvfp4 ? sigma / kRandomRms : 1.0f;
  return matrix;
}

const f32* random_bias(i64 count, Random* random, Memory* memory) {
  std::normal_distribution<f32> normal(0.0f, 0.3f);
  auto& bias = memory->floats.emplace_back(count);
  std::generate(bias.begin(), bias.end(), [&] { return normal(*random); });
  return bias.data();
}

weights::Expert random_expert(const Problem& p, bool biases, Random* random, Memory* memory) {
  std::uniform_real_distribution<f32> factor(1.05f, 2.0f);
  weights::Expert expert;
  expert.up = random_matrix(p.encoding, p.inter, p.hidden, 1.0f, random, memory);
  expert.down = random_matrix(p.encoding, p.hidden, p.inter, factor(*random), random, memory);
  if (p.activation.gated()) {
    expert.gate = random_matrix(p.encoding, p.inter, p.hidden, factor(*random), random, memory);
  }
  if (biases) {
    expert.up_bias = random_bias(p.inter, random, memory);
    expert.down_bias = random_bias(p.hidden, random, memory);
    if (p.activation.gated()) expert.gate_bias = random_bias(p.inter, random, memory);
  }
  expert.input_scale = factor(*random) * 4.0f / format::kNvfp4Max;
  expert.inter_scale = factor(*random) * 4.0f / format::kNvfp4Max;
  return expert;
}

void pick_distinct(const Spec& spec, Random* random, i32* ids) {
  std::vector<f64> weight(spec.problem.experts, 1.0);
  if (spec.routes == Routes::skewed) {
    for (i32 e = 0; e < spec.problem.experts; ++e) weight[e] = 1.0 / (e + 1);
  }
  for (i32 p = 0; p < spec.problem.top_k; ++p) {
    ids[p] = static_cast<i32>(std::discrete_distribution<i32>(weight.begin(), weight.end())(*random));
    weight[ids[p]] = 0.0;
  }
}

// Normal, but for the picks, which lie above all others, the first highest.
std::vector<f32> logits_of(const Spec& spec, const std::vector<i32>& ids, Random* random) {
  const Problem& p = spec.problem;
  std::normal_distribution<f32> normal;
  std::vector<f32> logits(i64{spec.tokens} * p.experts);
  std::generate(logits.begin(), logits.end(), [&] { return std::min(normal(*random), 4.0f); });
  for (i64 pick = 0; pick < std::ssize(ids); ++pick) {
    const f32 rank = static_cast<f32>(pick % p.top_k) / static_cast<f32>(p.top_k);
    logits[pick / p.top_k * p.experts + ids[pick]] = 6.0f - rank;
  }
  return logits;
}

}  // namespace

Problem problem(i32 hidden, i32 inter, i32 experts, i32 top_k) {
  Problem p;
  p.hidden = hidden;
  p.inter = inter;
  p.experts = p.local_experts = experts;
  p.top_k = top_k;
  return p;
}

Spec spec(i32 hidden, i32 inter, i32 experts, i32 top_k, i32 tokens) {
  Spec s;
  s.problem = problem(hidden, inter, experts, top_k);
  s.tokens = tokens;
  return s;
}

checkpoint::Layer random_layer(const Problem& p, u64 seed, bool biases) {
  Random random(seed);
  auto memory = std::make_shared<Memory>();
  checkpoint::Layer layer;
  layer.problem = p;
  for (i32 e = 0; e < p.local_experts; ++e) {
    layer.experts.push_back(random_expert(p, biases, &random, memory.get()));
  }
  layer.owner = memory;
  return layer;
}

Call::Call(const Spec& s) : spec(s) {
  Random random(s.seed * 7919 + 1);
  std::normal_distribution<f32> normal(0.0f, s.amplitude);
  const i64 values = i64{s.tokens} * s.problem.hidden;
  hidden.resize(values * format::dtype_bytes(s.hidden));
  for (i64 i = 0; i < values; ++i) format::write(hidden.data(), s.hidden, i, normal(random));
  ids.resize(i64{s.tokens} * s.problem.top_k, 0);
  weights.resize(ids.size());
  std::uniform_real_distribution<f32> weight(0.05f, 1.0f);
  std::generate(weights.begin(), weights.end(), [&] { return weight(random); });
  if (s.routes == Routes::one_expert) return;
  for (i32 t = 0; t < s.tokens; ++t) pick_distinct(s, &random, ids.data() + i64{t} * s.problem.top_k);
  if (s.by_logits) logits = logits_of(s, ids, &random);
  if (s.routes != Routes::holes) return;
  for (i32& id : ids) id = random() % 3 == 0 ? -1 : id;
}

LayerCall Call::view(std::vector<u8>* output, Dtype dtype) const {
  const Problem& p = spec.problem;
  output->assign(i64{spec.tokens} * p.hidden * format::dtype_bytes(dtype), 0xff);  // NaN in every float type
  LayerCall call;
  call.hidden = {const_cast<u8*>(hidden.data()), spec.hidden, spec.tokens, p.hidden, p.hidden};
  if (spec.by_logits) {
    call.logits = {const_cast<f32*>(logits.data()), Dtype::f32, spec.tokens, p.experts, p.experts};
  } else {
    call.ids = {const_cast<i32*>(ids.data()), Dtype::i32, spec.tokens, p.top_k, p.top_k};
    call.weights = {const_cast<f32*>(weights.data()), Dtype::f32, spec.tokens, p.top_k, p.top_k};
  }
  call.output = {output->data(), dtype, spec.tokens, p.hidden, p.hidden};
  return call;
}

std::vector<f64> run(const Spec& spec, const LayerOptions& options, Dtype dtype) {
  Layer layer(random_layer(spec.problem, spec.seed, spec.biases), options);
  const Call call(spec);
  std::vector<u8> bytes;
  throw_unless_ok(run_mirrored(&layer, call.view(&bytes, dtype)));
  std::vector<f64> values(i64{spec.tokens} * spec.problem.hidden);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = format::read(bytes.data(), dtype, i);
  return values;
}

f64 rel_l2(const std::vector<f64>& a, const std::vector<f64>& b) {
  f64 difference = 0.0;
  f64 norm = 0.0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  if (a.size() != b.size() || !std::isfinite(difference)) return std::numeric_limits<f64>::infinity();
  if (norm == 0.0) return difference == 0.0 ? 0.0 : std::numeric_limits<f64>::infinity();
  return std::sqrt(difference / norm);
}

// The intermediate is rounded in both rooms, and a sum that differs in its last bits can round to a neighbour: with
// w4a16 that moves few values by up to 2^-8 of themselves, with w4a4 by a whole E2M1 step. Sums of dense weights differ
// more often than those of 4-bit ones, whose products are short: one value of a small layer made 2.7e-4 on a GPU. With
// w4a8_int8 it can move a code by one, 1/127 of the largest value of its group of 32: 2.8e-3 of eight groups.
f64 bound(const Problem& problem) {
  if (problem.precision == Precision::w4a4) return 1e-2;
  if (problem.precision == Precision::w4a8_int8) return 3e-3;
  return format::is_fp4(problem.encoding) ? 2e-4 : 5e-4;
}

f64 flops(const Problem& p, i64 picks) {
  return 2.0 * static_cast<f64>(picks) * (p.activation.gated() ? 3 : 2) * p.hidden * p.inter;
}

i64 expert_bytes(const Problem& p) {
  format::Matrix matrix;
  matrix.rows = p.inter;
  matrix.cols = p.hidden;
  matrix.encoding = p.encoding;
  return matrix.bytes() * (p.activation.gated() ? 3 : 2);
}

i64 active_experts(const std::vector<i32>& ids) {
  std::set<i32> seen(ids.begin(), ids.end());
  seen.erase(-1);
  return static_cast<i64>(seen.size());
}

std::string describe(const Spec& spec) {
  static constexpr std::string_view kRoutes[] = {"random", "skewed", "one expert", "holes"};
  const Problem& p = spec.problem;
  return fmt::format("H{} I{} E{} k{} T{} {} {} {} x{:g} {}{}", p.hidden, p.inter, p.experts, p.top_k, spec.tokens,
                     format::encoding_name(p.encoding), precision_name(p.precision), activation_name(p.activation.kind),
                     spec.amplitude, kRoutes[static_cast<int>(spec.routes)], spec.biases ? " biases" : "");
}

}  // namespace fourmoe::cases
