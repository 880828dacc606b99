// The cpu room, stage by stage, at every instruction level of this machine.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "backends/list.h"
#include "case.h"
#include "format/quantise.h"
#include "gemm1/activation.h"

namespace fourmoe {
namespace {

using cases::Routes;
using format::Dtype;
using format::Encoding;

constexpr i32 kSpareSlots = 3;  // rows beyond those in use, which nobody may touch
constexpr u8 kPoison = 0xfe;

const Step& step(std::string_view room, std::string_view name) {
  for (const Step* s : backends::list()) {
    if (s->room == room && s->name == name) return *s;
  }
  throw Error(Reason::internal, fmt::format("no step {}.{}", room, name));
}

std::vector<CpuLevel> levels() {
  std::vector<CpuLevel> found;
  for (const CpuLevel level : kCpuLevels) {
    if (level <= machine().cpu_level) found.push_back(level);
  }
  return found;
}

// A host's own pool: as many threads as it says, more than the machine has if need be.
class Threads final : public Executor {
 public:
  explicit Threads(i32 count) : count_(count) {}
  i32 threads() const override { return count_; }
  void parallel_for(i64 count, const Task& task) override {
    std::atomic<i64> next = 0;
    std::vector<std::thread> pool;
    for (i32 t = 0; t < count_; ++t) {
      pool.emplace_back([&] {
        for (i64 index = next++; index < count; index = next++) task(index);
      });
    }
    for (std::thread& thread : pool) thread.join();
  }

 private:
  i32 count_;
};

// How a stage is run: by whom, where, with how many threads.
struct How {
  std::string_view room = "cpu";
  CpuLevel level = CpuLevel::portable;
  i32 threads = 2;
};

// One layer, one call, and memory for what its stages hand on.
class Stages {
 public:
  explicit Stages(const cases::Spec& s) : spec(s), problem(s.problem), call(s) {
    spec.problem.max_tokens = problem.max_tokens = s.tokens;
    layer = cases::random_layer(problem, s.seed, s.biases);
    packed = std::make_unique<weights::Packed>(layer.experts, *step("cpu", "gemm1").order, tbb_executor(2));
    const i64 picks = i64{s.tokens} * problem.top_k;
    const i64 slots = picks + kSpareSlots;
    ids.resize(picks);
    pick_weights.resize(picks);
    begin.resize(problem.local_experts + 1);
    slot_pick.resize(picks);
    pick_slot.resize(picks);
    codes.resize(picks * problem.hidden / 2);
    scales.resize(picks * problem.hidden / 16);
    rows.resize(slots * problem.inter);
    inter_codes.resize(slots * problem.inter / 2);
    inter_scales.resize(slots * problem.inter / 16);
    partial.resize(slots * problem.hidden);
    bind();
    throw_unless_ok(step("host", "route").run({nullptr, &args, nullptr}));
  }

  i32 slots() const { return begin[problem.local_experts]; }

  void gemm1(const How& how) {
    poison(&rows);
    poison(&inter_codes);
    poison(&inter_scales);
    run(how, "gemm1");
    expect_poison(rows, slots() * i64{problem.inter});
    expect_poison(inter_codes, slots() * i64{problem.inter} / 2);
    expect_poison(inter_scales, slots() * i64{problem.inter} / 16);
  }

  void gemm2(const How& how) {
    poison(&partial);
    run(how, "gemm2");
    expect_poison(partial, slots() * i64{problem.hidden});
  }

  // Intermediate of all slots as gemm2 reads it, with its global.
  std::vector<f64> inter() const {
    std::vector<f64> values;
    for (i64 slot = 0; slot < slots(); ++slot) {
      const f64 global = expert_of(slot).inter_scale;
      for (i64 i = 0; i < problem.inter; ++i) {
        const i64 at = slot * problem.inter + i;
        if (problem.precision != Precision::w4a4) values.push_back(format::read(rows.data(), problem.activations, at));
        else
          values.push_back(format::from_e2m1(format::code_at(inter_codes.data(), at)) *
                           f64{format::from_e4m3(inter_scales[at / 16])} * global);
      }
    }
    return values;
  }

  std::vector<f64> output() const { return {partial.begin(), partial.begin() + slots() * i64{problem.hidden}}; }

  const weights::Expert& expert_of(i64 slot) const {
    return layer.experts[ids[slot_pick[slot]] - problem.first_expert];
  }

  cases::Spec spec;
  Problem problem;
  cases::Call call;
  checkpoint::Layer layer;
  std::unique_ptr<weights::Packed> packed;
  Args args;
  std::vector<i32> ids, begin, slot_pick, pick_slot;
  std::vector<f32> pick_weights, partial;
  std::vector<u8> codes, scales, inter_codes, inter_scales, unused;
  std::vector<u16> rows;

 private:
  template <class T>
  static void poison(std::vector<T>* memory) {
    std::memset(memory->data(), kPoison, memory->size() * sizeof(T));
  }

  template <class T>
  static void expect_poison(const std::vector<T>& memory, i64 from) {
    const u8* bytes = reinterpret_cast<const u8*>(memory.data());
    EXPECT_TRUE(std::all_of(bytes + from * sizeof(T), bytes + memory.size() * sizeof(T), [](u8 b) {
      return b == kPoison;
    })) << "rows beyond the slots in use were touched";
  }

  void bind() {
    const LayerCall view = call.view(&unused, Dtype::f32);
    args.problem = &problem;
    args.executor = &tbb_executor(2);
    args.weights = {layer.experts};
    args.tokens = spec.tokens;
    args.hidden = view.hidden;
    args.picks.ids = view.ids;
    args.picks.weights = view.weights;
    args.slots = {ids.data(),       pick_weights.data(), begin.data(), slot_pick.data(),
                  pick_slot.data(), codes.data(),        scales.data()};
    const bool quantised = problem.precision == Precision::w4a4;
    args.inter.rows = quantised ? nullptr : rows.data();
    args.inter.codes = quantised ? inter_codes.data() : nullptr;
    args.inter.scales = quantised ? inter_scales.data() : nullptr;
    args.partial.rows = partial.data();
  }

  void run(const How& how, std::string_view name) {
    Machine here = machine();
    here.cpu_level = how.level;
    here.cores = how.threads;
    args.machine = &here;
    Threads threads(how.threads);
    args.executor = &threads;
    const Step& s = step(how.room, name);
    ASSERT_TRUE(s.can(problem, here).accepted()) << s.can(problem, here).detail;
    const i64 bytes = s.bytes(problem, here);
    std::vector<std::byte> scratch(bytes + 128, std::byte{kPoison});
    std::byte* base = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64);
    const Status status = s.run({&s, &args, base});
    ASSERT_TRUE(status.ok()) << status.detail;
    EXPECT_TRUE(std::all_of(base + bytes, scratch.data() + scratch.size(), [](std::byte b) {
      return b == std::byte{kPoison};
    })) << "more scratch was used than bytes() asks for";
  }
};

// One slot's gate, up and activation in double, from the checkpoint's weights and nothing else of the library's bodies.
std::vector<f64> plain_gemm1(const Stages& s, i64 slot) {
  const Problem& p = s.problem;
  const weights::Expert& expert = s.expert_of(slot);
  const i64 token = s.slot_pick[slot] / p.top_k;
  std::vector<f64> x(p.hidden);
  for (i64 k = 0; k < p.hidden; ++k) x[k] = format::read(s.args.hidden.row(token), s.args.hidden.dtype, k);
  std::vector<f64> y(p.inter);
  const auto dot = [&](const format::Matrix& matrix, const f32* bias, i64 row) {
    f64 sum = 0.0;
    for (i64 k = 0; k < p.hidden; ++k) sum += format::weight_at(matrix, row, k) * x[k];
    return sum * matrix.global + (bias == nullptr ? 0.0 : f64{bias[row]});
  };
  for (i64 i = 0; i < p.inter; ++i) {
    const f64 gate = p.activation.gated() ? dot(expert.gate, expert.gate_bias, i) : 0.0;
    y[i] = gemm1::activate(p.activation, gate, dot(expert.up, expert.up_bias, i));
  }
  return y;
}

std::vector<f64> plain_gemm2(const Stages& s, i64 slot, const f64* y) {
  const weights::Expert& expert = s.expert_of(slot);
  std::vector<f64> z(s.problem.hidden);
  for (i64 h = 0; h < s.problem.hidden; ++h) {
    f64 sum = 0.0;
    for (i64 i = 0; i < s.problem.inter; ++i) sum += format::weight_at(expert.down, h, i) * y[i];
    z[h] = sum * expert.down.global + (expert.down_bias == nullptr ? 0.0 : f64{expert.down_bias[h]});
  }
  return z;
}

void append(std::vector<f64>* all, const std::vector<f64>& more) { all->insert(all->end(), more.begin(), more.end()); }

cases::Spec spec_of(i32 hidden, i32 inter, i32 tokens, Encoding encoding = Encoding::nvfp4) {
  cases::Spec spec;
  spec.problem = cases::problem(hidden, inter, 7, 3);
  spec.problem.encoding = encoding;
  spec.tokens = tokens;
  return spec;
}

class CpuRoom : public testing::TestWithParam<CpuLevel> {
 protected:
  How how(i32 threads = 2) const { return {"cpu", GetParam(), threads}; }
};

INSTANTIATE_TEST_SUITE_P(Levels, CpuRoom, testing::ValuesIn(levels()),
                         [](const auto& level) { return std::string(cpu_level_name(level.param)); });

TEST_P(CpuRoom, EqualsPlainDoubleArithmetic) {
  for (const Encoding encoding :
       {Encoding::nvfp4, Encoding::mxfp4, Encoding::bf16, Encoding::f16, Encoding::f32, Encoding::fp8}) {
    cases::Spec spec = spec_of(96, 160, 9, encoding);
    spec.biases = true;
    Stages s(spec);
    SCOPED_TRACE(cases::describe(spec));
    s.gemm1(how());
    s.gemm2(how());
    std::vector<f64> y, z;
    const std::vector<f64> found = s.inter();
    for (i64 slot = 0; slot < s.slots(); ++slot) {
      append(&y, plain_gemm1(s, slot));
      append(&z, plain_gemm2(s, slot, found.data() + slot * s.problem.inter));
    }
    EXPECT_LE(cases::rel_l2(found, y), 3e-3);
    EXPECT_LE(cases::rel_l2(s.output(), z), 1e-6);  // the bound is 2e-4; f32 sums of 160 products are far inside
    EXPECT_GT(cases::rel_l2(s.output(), std::vector<f64>(z.size(), 0.0)), 0.0);
  }
}

// Every code times every finite scale, exact to the bit: one-hot intermediates read the weights out.
TEST_P(CpuRoom, DecodesEveryCodeAndScale) {
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
    const i32 count = encoding == Encoding::nvfp4 ? 127 : 255;  // scale bytes that are numbers
    cases::Spec spec = spec_of(256, 32, 32, encoding);
    spec.problem.experts = spec.problem.local_experts = spec.problem.top_k = 1;
    spec.routes = Routes::one_expert;
    Stages s(spec);
    std::vector<u8> codes(256 * 16), scales(256 * 2);
    for (i64 i = 0; i < 256 * 16; ++i) codes[i] = static_cast<u8>((2 * i % 16) | (2 * i + 1) % 16 << 4);
    const i64 blocks = 32 / format::block_of(encoding);
    for (i64 row = 0; row < 256; ++row) std::fill_n(&scales[row * blocks], blocks, static_cast<u8>(row % count));
    format::Matrix& down = s.layer.experts[0].down;
    down.data = codes.data();
    down.scales = scales.data();
    down.global = 1.0f;
    s.packed = std::make_unique<weights::Packed>(s.layer.experts, *step("cpu", "gemm2").order, tbb_executor(1));
    std::fill(s.rows.begin(), s.rows.end(), u16{0});
    for (i64 slot = 0; slot < 32; ++slot) s.rows[slot * 32 + slot] = format::to_bf16(1.0f);
    s.gemm2(how());
    for (i64 slot = 0; slot < 32; ++slot) {
      for (i64 h = 0; h < 256; ++h) {
        const f32 expected = static_cast<f32>(format::weight_at(down, h, slot));
        ASSERT_EQ(s.partial[slot * 256 + h], expected) << "code " << slot % 16 << ", scale byte " << h % count;
      }
    }
  }
}

// Rows of rare scales among usual ones: those that no bf16 holds beside the others, and blocks of zeros whose scale is
// the least. Every row is compared with its own size. 160 columns end in a group of two blocks.
TEST_P(CpuRoom, RareScalesAmongUsualOnes) {
  constexpr i64 kCols = 160, kBlocks = kCols / 32;
  for (const i32 tokens : {1, 17, 40, 90}) {
    cases::Spec spec = spec_of(96, kCols, tokens, Encoding::mxfp4);
    spec.problem.experts = spec.problem.local_experts = spec.problem.top_k = 1;
    spec.routes = Routes::one_expert;
    Stages s(spec);
    format::Matrix& down = s.layer.experts[0].down;
    std::vector<u8> codes(down.data, down.data + 96 * kCols / 2), scales(down.scales, down.scales + 96 * kBlocks);
    for (const auto& [row, scale] :
         {std::pair{3, 0}, {20, 30}, {21, 59}, {34, 2}, {40, 60}, {82, 160}, {83, 161}, {70, 200}}) {
      scales[row * kBlocks + row % kBlocks] = static_cast<u8>(scale);
    }
    for (const i64 row : {5, 90}) {
      std::fill_n(&codes[(row * kCols + 64) / 2], 16, static_cast<u8>(row == 5 ? 0x00 : 0x88));
      scales[row * kBlocks + 2] = 0;
    }
    std::fill_n(&codes[34 * kCols / 2], 64, u8{0});  // what is left of this row are products below 2^-126
    down.data = codes.data();
    down.scales = scales.data();
    s.packed = std::make_unique<weights::Packed>(s.layer.experts, *step("cpu", "gemm2").order, tbb_executor(1));
    s.gemm1(how());
    const std::vector<f64> y = s.inter();
    s.gemm2(how());
    for (i64 slot = 0; slot < tokens; ++slot) {
      const std::vector<f64> z = plain_gemm2(s, slot, y.data() + slot * kCols);
      for (i64 h = 0; h < 96; ++h) {
        f64 size = 0.0;
        for (i64 k = 0; k < kCols; ++k) size += std::abs(format::weight_at(down, h, k) * y[slot * kCols + k]);
        ASSERT_NEAR(s.partial[slot * 96 + h], z[h], 1e-6 * size) << "row " << h << ", " << tokens << " tokens";
      }
    }
  }
}

// The host's route hands on one row a slot, whichever experts share an input scale.
TEST(CpuRoomTokens, EverySlotHasItsExpertsQuantisedRow) {
  for (const bool weight_on_input : {false, true}) {
    for (const int shared : {1, 2, 7}) {  // experts that share an input scale
      cases::Spec spec = spec_of(80, 48, 9);
      spec.problem.precision = Precision::w4a4;
      spec.routes = Routes::holes;
      spec.problem.routing.weight_on_input = weight_on_input;
      if (weight_on_input) spec.problem.top_k = 1;
      Stages s(spec);
      for (int e = 0; e < 7; ++e) s.layer.experts[e].input_scale = 0.01f * static_cast<f32>(1 + e / shared);
      s.args.weights.experts = s.layer.experts;
      std::ranges::fill(s.codes, kPoison);
      std::ranges::fill(s.scales, kPoison);
      throw_unless_ok(step("host", "route").run({nullptr, &s.args, nullptr}));
      for (i32 slot = 0; slot < s.slots(); ++slot) {
        const i64 pick = s.slot_pick[slot];
        std::vector<f32> x(80);
        for (i64 k = 0; k < 80; ++k) {
          x[k] = static_cast<f32>(format::read(s.call.hidden.data(), spec.hidden, pick / s.problem.top_k * 80 + k)) *
                 (weight_on_input ? s.pick_weights[pick] : 1.0f);
        }
        std::vector<u8> codes(40), scales(5);
        format::quantise_row(x.data(), 80, s.expert_of(slot).input_scale, codes.data(), scales.data());
        ASSERT_TRUE(std::equal(codes.begin(), codes.end(), &s.codes[slot * 40])) << slot << ", " << shared;
        ASSERT_TRUE(std::equal(scales.begin(), scales.end(), &s.scales[slot * 5])) << slot << ", " << shared;
      }
    }
  }
}

void expect_equals_reference(Stages* s, const How& how) {
  SCOPED_TRACE(cases::describe(s->spec));
  const Precision precision = s->problem.precision;
  s->gemm1({"reference"});
  const std::vector<f64> y = s->inter();
  s->gemm2({"reference"});
  const std::vector<f64> z = s->output();
  s->gemm2(how);  // on the reference's intermediate
  EXPECT_LE(cases::rel_l2(s->output(), z), 2e-4);
  s->gemm1(how);
  EXPECT_LE(cases::rel_l2(s->inter(), y), precision == Precision::w4a4 ? 1e-2 : 3e-3);
  s->gemm2(how);  // on its own
  EXPECT_LE(cases::rel_l2(s->output(), z), cases::bound(s->problem) * (precision == Precision::w4a16 ? 15 : 1));
}

TEST_P(CpuRoom, EqualsTheReferenceAtOddSizes) {
  for (const Precision precision : kPrecisions) {
    for (const auto& [hidden, inter] : {std::pair{16, 16}, {16, 80}, {80, 352}, {704, 48}, {48, 1856}, {2880, 16}}) {
      cases::Spec spec = spec_of(hidden, inter, 5);
      spec.problem.precision = precision;
      spec.problem.experts = spec.problem.local_experts = 3;
      spec.problem.top_k = 1;
      Stages s(spec);
      expect_equals_reference(&s, how());
    }
  }
}

TEST_P(CpuRoom, EqualsTheReferenceForEveryActivation) {
  for (const ActivationKind kind : {ActivationKind::swiglu, ActivationKind::swiglu_clamped, ActivationKind::geglu_erf,
                                    ActivationKind::geglu_tanh, ActivationKind::relu2}) {
    for (const Precision precision : kPrecisions) {
      for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
        cases::Spec spec = spec_of(96, 64, 6, encoding);
        spec.problem.activation.kind = kind;
        spec.problem.precision = precision;
        spec.amplitude = 4.0f;  // some gates beyond the clamp's limit
        spec.biases = true;
        Stages s(spec);
        expect_equals_reference(&s, how());
      }
    }
  }
}

TEST_P(CpuRoom, EqualsTheReferenceForEveryTokenType) {
  for (const Dtype hidden : {Dtype::bf16, Dtype::f16, Dtype::f32}) {
    for (const Dtype activations : {Dtype::bf16, Dtype::f16}) {
      for (const bool weight_on_input : {false, true}) {
        cases::Spec spec = spec_of(80, 48, 13);
        spec.hidden = hidden;
        spec.problem.activations = activations;
        spec.problem.routing.weight_on_input = weight_on_input;
        if (weight_on_input) spec.problem.top_k = 1;
        Stages s(spec);
        expect_equals_reference(&s, how());
      }
    }
  }
}

// A row is as exact at 2^99 as at 2^-100, whatever the rows beside it hold; a NaN stays in its row.
TEST_P(CpuRoom, RowsOfEveryMagnitude) {
  for (const i32 tokens : {1, 15, 40, 90}) {
    cases::Spec spec = spec_of(80, 48, tokens);
    spec.routes = Routes::one_expert;
    spec.problem.top_k = 1;
    Stages s(spec);
    std::mt19937_64 random(3);
    for (i64 slot = 0; slot < tokens; ++slot) {
      const f32 size = std::ldexp(1.0f, static_cast<i32>(slot * 37 % 200) - 100);
      for (i64 i = 0; i < 48; ++i) {
        const f32 unit = static_cast<f32>(random() % 255) / 128.0f - 1.0f;
        s.rows[slot * 48 + i] = format::to_bf16(unit * (i == 5 ? 64.0f * size : size));
      }
    }
    if (tokens > 7) s.rows[7 * 48 + 3] = 0x7fc0;
    const std::vector<f64> y = s.inter();
    s.gemm2(how());
    for (i64 slot = 0; slot < tokens; ++slot) {
      const std::vector<f64> z = plain_gemm2(s, slot, y.data() + slot * 48);
      const std::vector<f64> found(s.partial.begin() + slot * 80, s.partial.begin() + (slot + 1) * 80);
      if (slot == 7) ASSERT_NE(found[0], found[0]);
      else ASSERT_LE(cases::rel_l2(found, z), 1e-6) << slot << " of " << tokens;
    }
  }
}

// What w4a8_int8 makes of a row of 16-bit values, from the contract in format/quantise.h and nothing of its body.
std::vector<f64> plain_int8(const f64* x, i64 n) {
  std::vector<f64> out(n);
  for (i64 first = 0; first < n; first += 32) {
    const i64 end = std::min<i64>(n, first + 32);
    f64 amax = 0.0;
    for (i64 i = first; i < end; ++i) amax = std::max(amax, std::abs(x[i]));
    const f64 scale = 2.0 * static_cast<f32>(amax / 254.0);
    for (i64 i = first; i < end; ++i) {
      out[i] = scale == 0.0 ? 0.0 : std::nearbyint(static_cast<f32>(x[i] / scale)) * scale;
    }
  }
  return out;
}

// Rows whose groups of 32 columns differ by up to 2^40, some of zeros, times weights of both encodings: a scale that is
// dropped, taken of another group or of another row, and columns in another order are far beyond the bound.
void fill_int8_rows(Stages* s) {
  std::mt19937_64 random(5);
  const i64 cols = s->problem.inter;
  for (i64 at = 0; at < s->slots() * cols; ++at) {
    const i64 group = at % cols / 32 + at / cols * 7;
    const f32 size = group % 5 == 3 ? 0.0f : std::ldexp(1.0f, static_cast<i32>(group * 13 % 40) - 20);
    s->rows[at] = format::to_bf16((static_cast<f32>(random() % 255) / 128.0f - 1.0f) * size);
  }
}

TEST_P(CpuRoom, Int8TokensEqualPlainDoubleArithmetic) {
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
    for (const auto& [inter, tokens] : {std::pair{16, 3}, {32, 1}, {80, 5}, {208, 40}, {352, 2}, {1856, 30}}) {
      if (encoding == Encoding::mxfp4 && inter % 32 != 0) continue;
      cases::Spec spec = spec_of(64, inter, tokens, encoding);
      spec.problem.precision = Precision::w4a8_int8;
      spec.problem.experts = spec.problem.local_experts = 3;
      spec.problem.top_k = 2;
      Stages s(spec);
      SCOPED_TRACE(cases::describe(spec));
      fill_int8_rows(&s);
      const std::vector<f64> rows = s.inter();
      s.gemm2(how());
      for (i64 slot = 0; slot < s.slots(); ++slot) {
        const std::vector<f64> y = plain_int8(rows.data() + slot * inter, inter);
        const std::vector<f64> found(s.partial.begin() + slot * 64, s.partial.begin() + (slot + 1) * 64);
        ASSERT_LE(cases::rel_l2(found, plain_gemm2(s, slot, y.data())), 1e-6) << slot;
      }
    }
  }
}

// Scales down to those of the least bf16.
TEST_P(CpuRoom, Int8TokensOfEveryMagnitude) {
  cases::Spec spec = spec_of(80, 48, 64);
  spec.problem.precision = Precision::w4a8_int8;
  spec.routes = Routes::one_expert;
  spec.problem.top_k = 1;
  Stages s(spec);
  for (const u16 least : {u16{1}, u16{0x80}, u16{0x7980}}) {  // 2^-133, the least bf16; 2^-126; 2^116
    for (i64 at = 0; at < 64 * 48; ++at) s.rows[at] = static_cast<u16>((at % 3 == 0 ? 0x8000 : 0) | least);
    const std::vector<f64> rows = s.inter();
    s.gemm2(how());
    const std::vector<f64> y = plain_int8(rows.data(), 48);
    const std::vector<f64> z = plain_gemm2(s, 0, y.data());
    for (i64 slot = 0; slot < 64; ++slot) {
      for (i64 h = 0; h < 80; ++h) {
        // Below 2^-126 a sum is a multiple of 2^-149, three times a block: once scaled, once added, and once as a
        // result.
        ASSERT_NEAR(s.partial[slot * 80 + h], z[h], std::abs(z[h]) * 1e-5 + std::ldexp(1.0, -136)) << least;
      }
    }
  }
}

// At every level, as the reference and GPUs take them.
TEST_P(CpuRoom, AnInfiniteF16IsTheLargest) {
  for (const Precision precision : {Precision::w4a16, Precision::w4a8_int8}) {
    for (const u16 sign : {u16{0}, u16{0x8000}}) {
      cases::Spec spec = spec_of(80, 48, 20);
      spec.problem.precision = precision;
      spec.hidden = spec.problem.activations = Dtype::f16;
      Stages large(spec), infinite(spec);
      const auto put = [&](Stages* s, u16 half) { std::memcpy(s->call.hidden.data() + 2 * (3 * 80 + 71), &half, 2); };
      put(&large, sign | 0x7bff), put(&infinite, sign | 0x7c00);
      for (Stages* s : {&large, &infinite}) s->gemm1(how()), s->gemm2(how());
      for (i64 slot = 0; slot < large.slots(); ++slot) {
        ASSERT_EQ(0, std::memcmp(&infinite.partial[slot * 80], &large.partial[slot * 80], 4 * 80)) << slot;
        ASSERT_TRUE(std::isfinite(infinite.partial[slot * 80]));
      }
    }
  }
}

// A token that is not finite gives NaN in its own slots, through a zero weight too, and changes no bit of the others.
TEST_P(CpuRoom, Int8TokensThatAreNotFinite) {
  for (const u16 bad : {u16{0x7fc0}, u16{0xffc1}, u16{0x7f80}, u16{0xff80}}) {
    cases::Spec spec = spec_of(80, 48, 20);
    spec.problem.precision = Precision::w4a8_int8;
    Stages right(spec), s(spec);
    std::memcpy(s.call.hidden.data() + 2 * (3 * 80 + 71), &bad, 2);
    right.gemm1(how());
    right.gemm2(how());
    s.gemm1(how());
    s.gemm2(how());
    for (i64 slot = 0; slot < s.slots(); ++slot) {
      const bool hit = s.slot_pick[slot] / spec.problem.top_k == 3;
      for (i64 i = 0; hit && i < 48; ++i) ASSERT_TRUE(std::isnan(format::from_bf16(s.rows[slot * 48 + i])));
      for (i64 h = 0; hit && h < 80; ++h) ASSERT_TRUE(std::isnan(s.partial[slot * 80 + h]));
      ASSERT_EQ(hit, 0 != std::memcmp(&s.partial[slot * 80], &right.partial[slot * 80], 4 * 80)) << slot;
    }
  }
}

// A NaN of a token or an infinite gate shows in what it meets and in nothing else.
TEST_P(CpuRoom, ActivationsKeepNaNs) {
  for (const ActivationKind kind : {ActivationKind::swiglu, ActivationKind::swiglu_clamped, ActivationKind::geglu_erf,
                                    ActivationKind::geglu_tanh, ActivationKind::relu2}) {
    cases::Spec spec = spec_of(64, 48, 20);
    spec.problem.activation.kind = kind;
    Stages s(spec);
    const u16 nan = 0x7fc0;
    std::memcpy(s.call.hidden.data() + 2 * (3 * 64 + 11), &nan, 2);
    s.gemm1(how());
    for (i64 slot = 0; slot < s.slots(); ++slot) {
      const bool hit = s.slot_pick[slot] / spec.problem.top_k == 3;
      for (i64 i = 0; i < 48; ++i) {
        const f32 y = format::from_bf16(s.rows[slot * 48 + i]);
        ASSERT_EQ(y != y, hit) << slot;
      }
    }
  }
}

TEST_P(CpuRoom, F16IntermediatesSaturate) {
  cases::Spec spec = spec_of(64, 32, 4);
  spec.problem.activations = spec.hidden = Dtype::f16;
  spec.amplitude = 3000.0f;
  Stages s(spec);
  s.gemm1(how());
  const std::vector<f64> y = s.inter();
  EXPECT_TRUE(std::any_of(y.begin(), y.end(), [](f64 v) { return std::abs(v) == 65504.0; }));
  EXPECT_TRUE(std::all_of(y.begin(), y.end(), [](f64 v) { return std::abs(v) <= 65504.0; }));
}

// Results of a whole call at one number of threads: the bits of both stages' outputs.
struct Bits {
  std::vector<u16> rows;
  std::vector<u8> codes, scales;
  std::vector<f32> partial;
};

Bits run_bits(Stages* s, const How& how) {
  s->gemm1(how);
  s->gemm2(how);
  return {s->rows, s->inter_codes, s->inter_scales, s->partial};
}

bool same_bits(const Bits& a, const Bits& b) {
  return a.rows == b.rows && a.codes == b.codes && a.scales == b.scales &&
         std::memcmp(a.partial.data(), b.partial.data(), 4 * a.partial.size()) == 0;
}

TEST_P(CpuRoom, ThreadsDoNotChangeABit) {
  for (const Precision precision : kPrecisions) {
    cases::Spec spec = spec_of(208, 176, 75);
    spec.problem.precision = precision;
    spec.routes = Routes::skewed;
    Stages s(spec);
    const Bits one = run_bits(&s, how(1));
    for (const i32 threads : {1, 2, 5}) {
      EXPECT_TRUE(same_bits(run_bits(&s, how(threads)), one)) << threads << " threads";
    }
  }
}

// A token alone, and in batches that cut its expert's rows into chunks and tiles of every size.
TEST_P(CpuRoom, TheRestOfTheBatchDoesNotChangeABit) {
  for (const Precision precision : kPrecisions) {
    for (const Encoding encoding : {Encoding::nvfp4, Encoding::bf16}) {
      if (precision != Precision::w4a16 && encoding == Encoding::bf16) continue;
      cases::Spec spec = spec_of(80, 48, 1, encoding);
      spec.problem.precision = precision;
      spec.routes = Routes::one_expert;
      spec.problem.top_k = 1;
      Stages alone(spec);
      const Bits single = run_bits(&alone, how());
      for (i32 tokens = 2; tokens <= 150; tokens = tokens < 38 ? tokens + 1 : tokens + 37) {
        spec.tokens = tokens;  // token 0 is drawn first, so it is the same
        Stages batch(spec);
        const Bits all = run_bits(&batch, how());
        ASSERT_EQ(batch.slot_pick[0], 0);
        ASSERT_EQ(0, std::memcmp(all.partial.data(), single.partial.data(), 4 * spec.problem.hidden)) << tokens;
        if (precision != Precision::w4a4) ASSERT_EQ(0, std::memcmp(all.rows.data(), single.rows.data(), 2 * 48));
        else ASSERT_EQ(0, std::memcmp(all.codes.data(), single.codes.data(), 48 / 2));
      }
    }
  }
}

// Whole numbers and f32 give the same sums of a block, so the levels agree on w4a4 to the last bit.
// Every token, in batches that fill one to eight tiles of 16 rows and a second chunk.
TEST_P(CpuRoom, NoTokenOfABatchChangesABit) {
  cases::Spec spec = spec_of(176, 80, 150);
  spec.routes = Routes::one_expert;
  spec.problem.top_k = 1;
  Stages most(spec);
  const Bits all = run_bits(&most, how());
  for (const i32 tokens : {16, 31, 33, 48, 49, 64, 65, 80, 96, 97, 113, 128}) {
    spec.tokens = tokens;  // the first of those tokens
    Stages batch(spec);
    const Bits bits = run_bits(&batch, how());
    ASSERT_EQ(batch.slots(), tokens);
    ASSERT_EQ(0, std::memcmp(all.partial.data(), bits.partial.data(), 4 * i64{tokens} * spec.problem.hidden)) << tokens;
    ASSERT_EQ(0, std::memcmp(all.rows.data(), bits.rows.data(), 2 * i64{tokens} * spec.problem.inter)) << tokens;
  }
}

TEST(CpuRoomLevels, W4a4IsTheSameFromAvx512On) {
  if (machine().cpu_level < CpuLevel::vnni) GTEST_SKIP() << "this machine has no level vnni";
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
    for (const i32 tokens : {1, 3, 40, 130}) {
      cases::Spec spec = spec_of(224, 96, tokens, encoding);
      spec.problem.precision = Precision::w4a4;
      Stages s(spec);
      const Bits plain = run_bits(&s, {"cpu", CpuLevel::avx512});
      for (const CpuLevel level : levels()) {
        if (level < CpuLevel::vnni) continue;
        EXPECT_TRUE(same_bits(run_bits(&s, {"cpu", level}), plain)) << cpu_level_name(level) << ", " << tokens;
      }
    }
  }
}

// Sums of whole numbers are exact at every level; the portable one rounds a multiply-add twice, and e^x differs by
// level, so this compares gemm2 of one intermediate.
TEST(CpuRoomLevels, W4a8Int8IsTheSameFromAvx2On) {
  if (machine().cpu_level < CpuLevel::avx512) GTEST_SKIP() << "this machine has one such level at most";
  for (const Encoding encoding : {Encoding::nvfp4, Encoding::mxfp4}) {
    for (const Dtype activations : {Dtype::bf16, Dtype::f16}) {
      for (const i32 tokens : {1, 3, 40, 130}) {
        cases::Spec spec = spec_of(224, 96, tokens, encoding);
        spec.problem.precision = Precision::w4a8_int8;
        spec.problem.activations = activations;
        Stages s(spec);
        s.gemm1({"cpu", CpuLevel::avx2});
        s.gemm2({"cpu", CpuLevel::avx2});
        const std::vector<f64> avx2 = s.output();
        for (const CpuLevel level : levels()) {
          if (level < CpuLevel::avx512) continue;
          s.gemm2({"cpu", level});
          EXPECT_EQ(s.output(), avx2) << cpu_level_name(level) << ", " << tokens;
        }
        const Bits plain = run_bits(&s, {"cpu", CpuLevel::avx512});
        for (const CpuLevel level : levels()) {
          if (level < CpuLevel::avx512) continue;
          EXPECT_TRUE(same_bits(run_bits(&s, {"cpu", level}), plain)) << cpu_level_name(level) << ", " << tokens;
        }
      }
    }
  }
}

TEST_P(CpuRoom, RoutesOfEveryKind) {
  for (const Routes routes : {Routes::random, Routes::skewed, Routes::one_expert, Routes::holes}) {
    cases::Spec spec = spec_of(64, 48, 37);
    spec.routes = routes;
    spec.problem.first_expert = 2;
    spec.problem.local_experts = 3;
    Stages s(spec);
    expect_equals_reference(&s, how());
  }
}

TEST_P(CpuRoom, NoTokensAndNoSlots) {
  cases::Spec spec = spec_of(64, 48, 0);
  Stages none(spec);
  none.gemm1(how());
  none.gemm2(how());
  spec.tokens = 3;
  spec.routes = Routes::one_expert;  // of another rank
  spec.problem.first_expert = 1;
  spec.problem.local_experts = 2;
  Stages elsewhere(spec);
  EXPECT_EQ(elsewhere.slots(), 0);
  elsewhere.gemm1(how());
  elsewhere.gemm2(how());
}

TEST_P(CpuRoom, WeightsThatAreNotPackedAreRefused) {
  Stages s(spec_of(64, 48, 2));
  s.layer.experts[4].gemm1 = nullptr;
  Machine here = machine();
  here.cpu_level = GetParam();
  s.args.machine = &here;
  const Status status = step("cpu", "gemm1").run({nullptr, &s.args, nullptr});
  EXPECT_EQ(status.reason, Reason::internal);
  EXPECT_NE(status.detail.find("expert 4"), std::string::npos) << status.detail;
}

TEST_P(CpuRoom, SaysWhatItChooses) {
  Machine here = machine();
  here.cpu_level = GetParam();
  Problem problem = cases::problem(64, 48, 4, 2);
  const std::string words = step("cpu", "gemm1").describe(problem, here);
  EXPECT_EQ(words.find(cpu_level_name(GetParam())), 0u) << words;
  EXPECT_EQ(words.find("int8"), std::string::npos) << words;
  problem.precision = Precision::w4a8_int8;
  const std::string int8 = step("cpu", "gemm1").describe(problem, here);
  EXPECT_EQ(int8.find(cpu_level_name(GetParam())), 0u) << int8;
  EXPECT_NE(int8.find("on int8 tokens"), std::string::npos) << int8;
}

TEST(CpuRoomRefuses, DenseWeightsWithQuantisedTokens) {
  Problem problem = cases::problem(64, 48, 4, 2);
  problem.encoding = Encoding::bf16;
  for (const Precision precision : {Precision::w4a4, Precision::w4a8_int8}) {
    problem.precision = precision;
    const Verdict verdict = step("cpu", "gemm1").can(problem, machine());
    EXPECT_EQ(verdict.reason, Reason::precision_unsupported);
    EXPECT_EQ(verdict.detail.find(precision_name(precision)), 0u) << verdict.detail;
    EXPECT_NE(verdict.detail.find("w4a16 would pass"), std::string::npos) << verdict.detail;
  }
}

}  // namespace
}  // namespace fourmoe
