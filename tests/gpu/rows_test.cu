// Rows on a device against the host's bodies: logits, gather, quantise, combine.
#include <gtest/gtest.h>

#include <algorithm>

#include "args.h"
#include "combine/device.h"
#include "format/quantise.h"
#include "route/quantise.cuh"
#include "routed.h"

namespace fourmoe::combine {
extern const Step kHostStep;
}

namespace fourmoe::gpu_tests {
namespace {

using format::Dtype;

constexpr Dtype kFloats[] = {Dtype::f32, Dtype::f16, Dtype::bf16};

// [rows, cols] random values of a type, rows `stride` apart, and the view of a copy in device memory. With `nasty`,
// zeros, infinities, NaN, subnormals and whole blocks of zeros are among them.
struct Rows {
  Rows(Dtype type, i64 rows, i64 cols, i64 stride, u64 seed, bool nasty = false)
      : bytes(std::max<i64>(rows, 1) * stride * format::dtype_bytes(type), 0), device(static_cast<i64>(bytes.size())) {
    std::mt19937_64 random(seed);
    std::normal_distribution<f32> normal;
    host = {bytes.data(), type, rows, cols, stride};
    for (i64 i = 0; i < rows * cols; ++i) {
      const f32 odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-40f, -1e-42f, 3e38f, 65520.0f, 1e-30f};
      const bool zero_block = nasty && i / 16 % 5 == 1;
      const f32 value = nasty && random() % 97 == 0 ? odd[random() % 10] : normal(random);
      format::write(host.row(i / cols), type, i % cols, zero_block ? 0.0f : value);
    }
    device.write(bytes);
    view = host;
    view.data = device.get();
  }
  f32 at(i64 row, i64 col) const { return format::read(host.row(row), host.dtype, col); }

  std::vector<u8> bytes;
  Device<u8> device;
  format::Tensor host, view;
};

// A routed call with some picks that are none, not local or refused.
struct Slots {
  Slots(i32 hidden, i32 tokens, i32 top_k, bool weight_on_input = false)
      : problem(make(hidden, tokens, top_k, weight_on_input)),
        input(random_ids(problem, tokens, hidden + tokens)),
        host(run_host(problem, input, tokens)),
        device(problem, input, tokens) {
    EXPECT_TRUE(route::launch_slots(device.args, nullptr).ok());
    input_scales.resize(problem.local_experts);
    for (i32 e = 0; e < problem.local_experts; ++e) input_scales[e] = 0.001f + 0.0007f * e;
  }
  static Problem make(i32 hidden, i32 tokens, i32 top_k, bool weight_on_input) {
    Problem p = problem_of(24, top_k, tokens);
    p.hidden = hidden;
    p.first_expert = 3, p.local_experts = 18;
    p.routing.weight_on_input = weight_on_input;
    return p;
  }
  i64 used() const { return host.begin.back(); }
  i64 most() const { return i64{problem.max_tokens} * problem.top_k; }

  Problem problem;
  Input input;
  Result host;
  Routed device;
  std::vector<f32> input_scales;
};

struct Size {
  i32 hidden, tokens, top_k;
};
const std::vector<Size> kSizes = {{16, 1, 1}, {48, 7, 8}, {1040, 300, 8}, {2880, 64, 4}, {7168, 5, 9}, {32, 5000, 32}};

TEST(DeviceRows, LogitsAreTheHostsAndDoNotDependOnTheBatch) {
  FOURMOE_NEEDS_DEVICE();
  const std::pair<Dtype, Dtype> types[] = {{Dtype::f32, Dtype::f32},   {Dtype::f16, Dtype::f16},
                                           {Dtype::bf16, Dtype::bf16}, {Dtype::bf16, Dtype::f32},
                                           {Dtype::f32, Dtype::bf16},  {Dtype::f16, Dtype::f32}};
  for (const auto& [tokens_type, type] : types) {
    const i64 hidden = type == Dtype::f16 ? 1040 : 2048, experts = 37;
    const Rows router(type, experts, hidden, hidden, 1), tokens(tokens_type, 300, hidden, hidden + 16, 2);
    const Device<f32> bias(std::vector<f32>(experts, 0.125f));
    const std::vector<f32> host_bias(experts, 0.125f);
    format::Matrix matrix{router.bytes.data(), nullptr, hidden * format::dtype_bytes(type), 0, 37, i32(hidden)};
    matrix.encoding = type == Dtype::f32   ? format::Encoding::f32
                      : type == Dtype::f16 ? format::Encoding::f16
                                           : format::Encoding::bf16;
    std::vector<f32> want(300 * experts);
    route::logits(tokens.host, matrix, host_bias.data(), tbb_executor(8), want.data());
    std::vector<f32> all;
    for (const i64 count : {300, 1, 2, 3, 8, 16, 21, 128, 0}) {
      Device<f32> out(300 * experts);
      format::Tensor some = tokens.view;
      some.rows = count;
      ASSERT_TRUE(route::launch_logits({some, router.view, bias.get(), out.get()}, nullptr).ok());
      const std::vector<f32> got = out.read();
      if (count == 300) all = got;
      for (i64 i = 0; i < 300 * experts; ++i) {
        ASSERT_EQ(got[i], i < count * experts ? all[i] : poison<f32>()) << count;
        ASSERT_LE(ulps(all[i], want[i]), 1);
      }
    }
  }
}

TEST(DeviceRows, Gather) {
  FOURMOE_NEEDS_DEVICE();
  for (const Dtype type : {Dtype::bf16, Dtype::f32}) {
    for (const Size& size : kSizes) {
      for (const bool weighted : {false, true}) {
        const Slots s(size.hidden, size.tokens, weighted ? 1 : size.top_k, weighted);
        const Rows hidden(type, size.tokens, size.hidden, size.hidden + 8, 4, true);
        const Device<u16> rows(s.most() * size.hidden);
        ASSERT_TRUE(
            route::launch_gather({s.problem, size.tokens, hidden.view, s.device.args.out, nullptr, rows.get()}, nullptr)
                .ok());
        const std::vector<u16> got = rows.read();
        for (i64 i = 0; i < static_cast<i64>(got.size()); ++i) {
          const i64 slot = i / size.hidden;
          if (slot >= s.used()) {
            ASSERT_EQ(got[i], poison<u16>()) << "slot " << slot;
            continue;
          }
          const i32 pick = s.host.slot_pick[slot];
          const u16 x = format::to_bf16(hidden.at(pick / s.problem.top_k, i % size.hidden));
          const u16 want = weighted ? format::to_bf16(format::from_bf16(x) * s.host.weights[pick]) : x;
          if (!std::isnan(format::from_bf16(want))) ASSERT_EQ(got[i], want) << "slot " << slot;
          else ASSERT_TRUE(std::isnan(format::from_bf16(got[i])));
        }
      }
    }
  }
}

// f16 layers: the two planes sum to the f16 value, what is beyond f16 to its largest, and NaN to NaN.
TEST(DeviceRows, GatherOfF16IsTwoPlanesEveryType) {
  FOURMOE_NEEDS_DEVICE();
  for (const Dtype type : kFloats) {
    for (const bool weighted : {false, true}) {
      Slots s(1040, 37, weighted ? 1 : 4, weighted);
      s.problem.activations = Dtype::f16;
      const Rows hidden(type, 37, 1040, 1040 + 8, 4, true);
      const Device<u16> rows(2 * s.most() * 1040);
      ASSERT_TRUE(
          route::launch_gather({s.problem, 37, hidden.view, s.device.args.out, nullptr, rows.get()}, nullptr).ok());
      const std::vector<u16> got = rows.read();
      const auto rounded = [](f32 x) { return format::from_f16(format::to_f16_saturated(x)); };
      for (i64 i = 0; i < s.used() * 1040; ++i) {
        const i32 pick = s.host.slot_pick[i / 1040];
        f32 want = rounded(hidden.at(pick / s.problem.top_k, i % 1040));
        if (weighted) want = rounded(want * s.host.weights[pick]);
        const f32 sum = format::from_bf16(got[i]) + format::from_bf16(got[s.most() * 1040 + i]);
        if (std::isnan(want)) ASSERT_TRUE(std::isnan(sum));
        else ASSERT_EQ(sum, want) << i;
      }
    }
  }
}

// Every f16 there is, as a token's columns.
TEST(DeviceRows, EveryF16IsTwoPlanes) {
  FOURMOE_NEEDS_DEVICE();
  constexpr i32 kColumns = 1024;
  Slots s(kColumns, 64, 8);
  s.problem.activations = Dtype::f16;
  std::vector<u16> all(64 * kColumns);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<u16>(i);
  const Device<u16> tokens(all);
  const Device<u16> rows(2 * s.most() * kColumns);
  const format::Tensor view = {tokens.get(), Dtype::f16, 64, kColumns, kColumns};
  ASSERT_TRUE(route::launch_gather({s.problem, 64, view, s.device.args.out, nullptr, rows.get()}, nullptr).ok());
  const std::vector<u16> got = rows.read();
  for (i64 i = 0; i < s.used() * kColumns; ++i) {
    const u16 bits = all[i64{s.host.slot_pick[i / kColumns] / 8} * kColumns + i % kColumns];
    const f32 want = format::from_f16(format::to_f16_saturated(format::from_f16(bits)));
    const f32 sum = format::from_bf16(got[i]) + format::from_bf16(got[s.most() * kColumns + i]);
    if (std::isnan(want)) ASSERT_TRUE(std::isnan(sum)) << bits;
    else ASSERT_EQ(sum, want) << bits;
  }
}

TEST(DeviceRows, GatherRefusesWhatItCannotRead) {
  FOURMOE_NEEDS_DEVICE();
  const Slots s(48, 7, 8);
  const Device<u16> rows(s.most() * 48);
  const Rows odd(Dtype::bf16, 7, 48, 52, 1);
  const route::DeviceTokens args{s.problem, 7, odd.view, s.device.args.out, nullptr, rows.get()};
  EXPECT_EQ(route::launch_gather(args, nullptr).detail,
            "hidden_states has rows 104 bytes apart, expected a multiple of 16");
}

// `want(slot, x)` fills the f32 row that was quantised and returns its global scale.
template <class Want>
void check_quantised(const Device<u16>& got, i64 used, i64 cols, const Want& want) {
  const std::vector<u16> rows = got.read();
  std::vector<u8> codes(cols / 2), scales(cols / 16);
  std::vector<f32> x(cols), decoded(cols);
  for (i64 slot = 0; slot < static_cast<i64>(rows.size()) / cols; ++slot) {
    if (slot >= used) {
      ASSERT_EQ(rows[slot * cols], poison<u16>());
      continue;
    }
    const f32 global = want(slot, x.data());
    format::quantise_row(x.data(), cols, global, codes.data(), scales.data());
    format::dequantise_row(codes.data(), scales.data(), cols, decoded.data());
    for (i64 i = 0; i < cols; ++i) {
      const f32 value = format::from_bf16(rows[slot * cols + i]);
      ASSERT_TRUE(value == decoded[i] || (std::isnan(value) && std::isnan(decoded[i]))) << value << " " << decoded[i];
      ASSERT_FALSE(value == 0.0f && std::signbit(value)) << "slot " << slot << " column " << i;
    }
  }
}

TEST(DeviceRows, QuantisedTokens) {
  FOURMOE_NEEDS_DEVICE();
  for (const Dtype type : kFloats) {
    for (const Size& size : kSizes) {
      for (const bool weighted : {false, true}) {
        Slots s(size.hidden, size.tokens, weighted ? 1 : size.top_k, weighted);
        const Rows hidden(type, size.tokens, size.hidden, size.hidden + 8, 5, true);
        const Device<f32> scales(s.input_scales);
        const Device<u16> got(s.most() * size.hidden);
        const route::DeviceTokens args{s.problem, size.tokens, hidden.view, s.device.args.out, scales.get(), got.get()};
        ASSERT_TRUE(route::launch_quantise(args, nullptr).ok());
        check_quantised(got, s.used(), size.hidden, [&](i64 slot, f32* x) {
          const i32 pick = s.host.slot_pick[slot];
          const f32 weight = weighted ? s.host.weights[pick] : 1.0f;
          for (i32 h = 0; h < size.hidden; ++h) x[h] = hidden.at(pick / s.problem.top_k, h) * weight;
          return s.input_scales[s.host.ids[pick] - s.problem.first_expert];
        });
      }
    }
  }
}

// Tokens as their caller quantised them: any codes and any scales that are none of a fault, in strided rows.
struct Codes {
  Codes(i64 tokens, i64 hidden, u64 seed) : code_stride(hidden / 2 + 4), scale_stride(hidden / 16 + 1) {
    std::mt19937_64 random(seed);
    codes.resize(tokens * code_stride);
    scales.resize(tokens * scale_stride + 1);
    for (u8& byte : codes) byte = static_cast<u8>(random());
    for (u8& byte : scales) byte = static_cast<u8>(random() % (format::kLargestScale + 1));
  }
  u8* scale(i64 token, i64 block) { return &scales[1 + token * scale_stride + block]; }
  route::DeviceTokens args(const Slots& s, i32 tokens, Device<u8>* at, Device<u8>* scales_at, u16* rows) const {
    const i32 hidden = s.problem.hidden;
    at->write(codes), scales_at->write(scales);
    route::DeviceTokens a{s.problem, tokens, {at->get(), Dtype::u8, tokens, hidden / 2, code_stride}};
    a.slots = s.device.args.out;
    a.rows = rows;
    a.hidden_scales = {scales_at->get() + 1, Dtype::u8, tokens, hidden / 16, scale_stride};
    a.fault = s.device.fault.get();
    return a;
  }
  i64 code_stride, scale_stride;
  std::vector<u8> codes, scales;  // scales begin one byte after an aligned address
};

// Rows of slots in use are the codes' values; those of `refused` tokens and of slots not in use are untouched.
void check_decoded(const Slots& s, Codes& c, const std::vector<u16>& rows, const std::vector<i32>& refused) {
  const i64 hidden = s.problem.hidden;
  std::vector<f32> want(hidden);
  for (i64 slot = 0; slot < s.most(); ++slot) {
    const i32 token = slot < s.used() ? s.host.slot_pick[slot] / s.problem.top_k : -1;
    const bool written = token >= 0 && std::find(refused.begin(), refused.end(), token) == refused.end();
    if (written) {
      format::dequantise_row(c.codes.data() + token * c.code_stride, c.scale(token, 0), hidden, want.data());
    }
    for (i64 h = 0; h < hidden; ++h) {
      const u16 got = rows[slot * hidden + h];
      if (!written) ASSERT_EQ(got, poison<u16>()) << "slot " << slot;
      else ASSERT_EQ(std::bit_cast<u32>(format::from_bf16(got)), std::bit_cast<u32>(want[h])) << slot << ", " << h;
    }
  }
}

TEST(DeviceRows, TokensThatComeQuantisedAreDecodedExactly) {
  FOURMOE_NEEDS_DEVICE();
  for (const Size& size : kSizes) {
    const Slots s(size.hidden, size.tokens, size.top_k);
    Codes c(size.tokens, size.hidden, 11);
    Device<u8> codes(c.codes.size()), scales(c.scales.size());
    const Device<u16> rows(s.most() * size.hidden);
    ASSERT_TRUE(route::launch_decode(c.args(s, size.tokens, &codes, &scales, rows.get()), nullptr).ok());
    check_decoded(s, c, rows.read(), {});
    EXPECT_EQ(s.device.pick_slot.read(), s.host.pick_slot);
    EXPECT_EQ(s.device.read().status.detail, "");
  }
}

// Every byte that no quantiser writes, in the first block, the last, and beyond a block's threads.
TEST(DeviceRows, AScaleThatIsNaNOrNegativeIsAFaultOfItsToken) {
  FOURMOE_NEEDS_DEVICE();
  const i32 tokens = 140, hidden = 2880;
  Slots s(hidden, tokens, 4);
  Codes c(tokens, hidden, 12);
  std::vector<i32> refused;
  for (int byte = format::kLargestScale + 1; byte < 256; ++byte) {
    refused.push_back(static_cast<i32>(refused.size()) + 3);
    *c.scale(refused.back(), byte % 3 == 0 ? 0 : byte % 3 == 1 ? 179 : 130) = static_cast<u8>(byte);
  }
  *c.scale(3, 150) = 0xff;  // before its 0x7f in block 179: the first one is named
  Device<u8> codes(c.codes.size()), scales(c.scales.size());
  const Device<u16> rows(s.most() * hidden);
  ASSERT_TRUE(route::launch_decode(c.args(s, tokens, &codes, &scales, rows.get()), nullptr).ok());
  check_decoded(s, c, rows.read(), refused);
  std::vector<i32> want = s.host.pick_slot;
  for (const i32 token : refused) std::fill_n(want.begin() + token * 4, 4, route::kRefused);
  EXPECT_EQ(s.device.pick_slot.read(), want);
  const Status status = s.device.read().status;
  EXPECT_EQ(status.reason, Reason::scale_invalid);
  EXPECT_EQ(status.detail, "hidden_scales[3, 150] is 0xff: NaN or negative");
}

TEST(DeviceRows, CodesOfOddAddressesAreRefused) {
  FOURMOE_NEEDS_DEVICE();
  const Slots s(48, 7, 8);
  Codes c(7, 48, 13);
  Device<u8> codes(c.codes.size()), scales(c.scales.size());
  const Device<u16> rows(s.most() * 48);
  route::DeviceTokens args = c.args(s, 7, &codes, &scales, rows.get());
  args.hidden.data = codes.get() + 2;
  EXPECT_EQ(route::launch_decode(args, nullptr).detail, "hidden_states begins 2 bytes after a multiple of 4");
  args.hidden.data = codes.get();
  args.hidden.stride = 30;
  EXPECT_EQ(route::launch_decode(args, nullptr).detail,
            "hidden_states has rows 30 bytes apart, expected a multiple of 4");
}

TEST(DeviceRows, QuantisedIntermediate) {
  FOURMOE_NEEDS_DEVICE();
  for (const Size& size : kSizes) {
    Slots s(size.hidden, size.tokens, size.top_k);
    const Rows values(Dtype::f32, s.most(), size.hidden, size.hidden, 6, true);
    const Device<f32> globals(s.input_scales);
    const Device<u16> got(s.most() * size.hidden);
    const route::DeviceRows args{
        s.problem,         size.tokens,   size.hidden, static_cast<const f32*>(values.view.data),
        s.device.args.out, globals.get(), got.get()};
    const auto want = [&](i64 slot, f32* x) {
      for (i32 h = 0; h < size.hidden; ++h) x[h] = values.at(slot, h);
      return s.input_scales[s.host.ids[s.host.slot_pick[slot]] - s.problem.first_expert];
    };
    ASSERT_TRUE(route::launch_quantise_rows(args, nullptr).ok());
    check_quantised(got, s.used(), size.hidden, want);
  }
}

// Values at, just below and just above every tie of E2M1, of either sign, for steps from 2^-110 to 2^110: a division
// that is not correctly rounded gives other codes.
TEST(DeviceRows, QuantisedTies) {
  FOURMOE_NEEDS_DEVICE();
  const i32 cols = 1024;
  Slots s(cols, 300, 8);
  std::mt19937_64 random(1);
  for (f32& global : s.input_scales)
    global = std::ldexp(1.0f + static_cast<f32>(random() % 999) / 999.0f, -110 + static_cast<int>(random() % 220));
  std::vector<f32> x(s.most() * cols);
  for (i64 block = 0; block < static_cast<i64>(x.size()) / 16; ++block) {
    const i64 slot = block * 16 / cols;
    const f32 global =
        slot < s.used() ? s.input_scales[s.host.ids[s.host.slot_pick[slot]] - s.problem.first_expert] : 1.0f;
    const f32 ties[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    f32* values = x.data() + block * 16;
    values[0] =
        std::ldexp(1.0f + static_cast<f32>(random() % 4096) / 4096.0f, static_cast<int>(random() % 14)) * global;
    const f32 step = format::from_e4m3(format::block_scale(values[0], global)) * global;
    for (int i = 1; i < 15; ++i) {
      const f32 tie = ties[random() % 7] * step;
      const int away = static_cast<int>(random() % 5) - 2;
      values[i] = std::bit_cast<f32>(std::bit_cast<i32>(tie) + away) * (random() % 2 == 0 ? 1.0f : -1.0f);
      if (!(std::fabs(values[i]) <= values[0])) values[i] = -0.0f;
    }
    values[15] = -std::ldexp(step, -150 + static_cast<int>(random() % 3));  // rounds to -0, or does not
  }
  const Device<f32> values(x), globals(s.input_scales);
  const Device<u16> got(s.most() * cols);
  ASSERT_TRUE(route::launch_quantise_rows(
                  {s.problem, 300, cols, values.get(), s.device.args.out, globals.get(), got.get()}, nullptr)
                  .ok());
  check_quantised(got, s.used(), cols, [&](i64 slot, f32* row) {
    std::copy_n(x.data() + slot * cols, cols, row);
    return s.input_scales[s.host.ids[s.host.slot_pick[slot]] - s.problem.first_expert];
  });
}

// A thread a step: numbers at each tie of E2M1 and three ulps around it, which a quotient not rounded correctly there
// would take elsewhere.
__global__ void count_wrong_ties(u32* wrong) {
  const u32 mantissa = blockIdx.x * blockDim.x + threadIdx.x;
  const f32 step = __uint_as_float(0x3f800000u | mantissa);
  const route::Step s{step, 1.0f, 1.0f / step};
  const f32 ties[] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  u32 found = 0;
  for (const f32 tie : ties) {
    for (int away = -3; away <= 3; ++away) {
      const f32 x = __uint_as_float(__float_as_uint(tie * step) + away);
      const f32 want = gpu::from_e2m1(format::to_e2m1(x / step));
      found += route::round_e2m1(route::divide(x, s)) != want;
      found += route::round_e2m1(route::divide(-x, s)) != -want;
    }
  }
  if (found > 0) atomicAdd(wrong, found);
}

TEST(DeviceRows, TiesOfEveryStep) {
  FOURMOE_NEEDS_DEVICE();
  const Device<u32> wrong(std::vector<u32>(1));
  count_wrong_ties<<<(1 << 23) / 256, 256>>>(wrong.get());
  EXPECT_EQ(wrong.read()[0], 0u);
}

// A thread a row of (value, largest of its block, global): the value by requantise, and by the reference's steps.
__global__ void requantise_both(const f32 (*rows)[3], int count, f32 (*found)[2]) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const auto [x, largest, global] = rows[i];
  const f32 scale = format::from_e4m3(route::block_scale(route::magnitude_of(largest), global)), step = scale * global;
  found[i][0] = route::requantise(x, step, scale);
  found[i][1] = gpu::from_e2m1(format::to_e2m1(x / step)) * scale;
}

// Steps that are 0 or infinite among them, whose quotients of 0 and of infinity are NaN.
TEST(DeviceRows, RequantisedLikeTheReference) {
  FOURMOE_NEEDS_DEVICE();
  std::vector<std::array<f32, 3>> rows;
  for (const f32 global : {0x1p-149f, 0x1p-145f, 0x1p-100f, 0.01f, 1.0f, 0x1p100f, 0x1p120f, 0x1p127f}) {
    for (const f32 largest : {0.0f, 0x1p-149f, 1e-30f, 0.7f, 448.0f, 1e30f, INFINITY, NAN}) {
      for (const f32 part : {0.0f, 1e-8f, 0.04f, 0.125f, 0.3f, 0.7f, 1.0f}) {
        for (const f32 sign : {1.0f, -1.0f}) rows.push_back({sign * part * largest, largest, global});
      }
      rows.push_back({0.0f, largest, global});
    }
  }
  const int count = static_cast<int>(rows.size());
  const Device<std::array<f32, 3>> given(rows);
  const Device<std::array<f32, 2>> found(count);
  requantise_both<<<(count + 255) / 256, 256>>>(reinterpret_cast<const f32(*)[3]>(given.get()), count,
                                                reinterpret_cast<f32(*)[2]>(found.get()));
  const auto values = found.read();
  for (int i = 0; i < count; ++i) {
    const auto& [got, want] = values[i];
    EXPECT_TRUE(got == want || (std::isnan(got) && std::isnan(want)))
        << got << " for " << want << ", " << rows[i][0] << " of " << rows[i][1] << ", global " << rows[i][2];
  }
}

// Host and device sums, all bits; the device's token 0 is refused when `refused`.
void check_combine(const Size& size, Dtype type, bool with_addend, bool weighted, bool refused) {
  Slots s(size.hidden, size.tokens, weighted ? 1 : size.top_k, weighted);
  const Rows z(Dtype::f32, s.most(), size.hidden, size.hidden, 7, true);
  const Rows addend(Dtype::f32, size.tokens, size.hidden, size.hidden, 8);
  const i64 stride = size.hidden + 8;
  const Rows want(type, size.tokens + 2, size.hidden, stride, 9), start(type, size.tokens + 2, size.hidden, stride, 9);
  Args args;
  args.problem = &s.problem;
  args.executor = &tbb_executor(8);
  args.tokens = size.tokens;
  args.slots = {s.host.ids.data(), s.host.weights.data(), s.host.begin.data(), s.host.slot_pick.data(),
                s.host.pick_slot.data()};
  args.partial.rows = static_cast<f32*>(z.host.data);
  if (with_addend) args.addend.addend = static_cast<const f32*>(addend.host.data);
  args.output.output = want.host;
  const Bound bound{&combine::kHostStep, &args};
  ASSERT_TRUE(combine::kHostStep.run(bound).ok());

  if (refused) {
    std::vector<i32> slots = s.host.pick_slot;
    std::fill_n(slots.begin(), s.problem.top_k, route::kRefused);
    s.device.pick_slot.write(slots);
  }
  combine::DeviceSum sum{size.tokens,
                         size.hidden,
                         s.problem.top_k,
                         weighted,
                         s.device.pick_slot.get(),
                         s.device.weights.get(),
                         static_cast<const f32*>(z.view.data)};
  if (with_addend) sum.addend.addend = static_cast<const f32*>(addend.view.data);
  sum.out.output = start.view;
  ASSERT_TRUE(combine::launch_combine(sum, nullptr).ok());
  std::vector<u8> bytes = start.device.read();
  format::Tensor got = start.host;
  got.data = bytes.data();
  for (i64 t = 0; t < size.tokens + 2; ++t) {  // the last two rows are left alone
    for (i64 h = 0; h < size.hidden; ++h) {
      const f32 a = format::read(got.row(t), type, h), b = want.at(t, h);
      if (refused && t == 0) ASSERT_TRUE(std::isnan(a));
      else ASSERT_TRUE(std::bit_cast<u32>(a) == std::bit_cast<u32>(b) || (std::isnan(a) && std::isnan(b))) << a << b;
    }
  }
}

TEST(DeviceRows, CombineIsTheHostsBitForBit) {
  FOURMOE_NEEDS_DEVICE();
  for (const Size& size : kSizes) {
    for (const Dtype type : kFloats) {
      check_combine(size, type, false, false, false);
      check_combine(size, type, true, false, true);
      check_combine(size, type, true, true, false);
    }
  }
}

TEST(DeviceRows, ZeroTokensTouchNothing) {
  FOURMOE_NEEDS_DEVICE();
  const Problem p = Slots::make(48, 4, 2, false);
  Routed routed(p, {}, 0);
  ASSERT_TRUE(route::launch_slots(routed.args, nullptr).ok());
  const Device<u16> rows(4 * 2 * 48);
  route::DeviceTokens tokens{p, 0, {}, routed.args.out, nullptr, rows.get()};
  EXPECT_TRUE(route::launch_gather(tokens, nullptr).ok());
  EXPECT_TRUE(route::launch_quantise(tokens, nullptr).ok());
  EXPECT_TRUE(route::launch_decode(tokens, nullptr).ok());
  EXPECT_TRUE(route::launch_quantise_rows({p, 0, 48, nullptr, routed.args.out}, nullptr).ok());
  EXPECT_TRUE(combine::launch_combine({0, 48, 2}, nullptr).ok());
  EXPECT_EQ(rows.read(), std::vector<u16>(4 * 2 * 48, poison<u16>()));
}

// Routing, gather and combine of two layers of ever new routings in one graph, launches overlapping, against the host.
TEST(DeviceRows, AGraphOfAllStagesFollowsTheRouting) {
  FOURMOE_NEEDS_DEVICE();
  const i32 tokens = 33, hidden = 512, top_k = 4;
  Problem p = problem_of(64, top_k, tokens);
  p.hidden = hidden;
  Routed routed(p, random_logits(p, tokens, 0), tokens);
  const Rows x(Dtype::bf16, tokens, hidden, hidden, 3);
  const Rows z(Dtype::f32, tokens * top_k, hidden, hidden, 4);
  const Device<u16> rows(i64{tokens} * top_k * hidden);
  const Device<f32> out(i64{tokens} * hidden);
  combine::DeviceSum sum{
      tokens, hidden, top_k, false, routed.pick_slot.get(), routed.weights.get(), static_cast<const f32*>(z.view.data)};
  sum.out.output = {out.get(), Dtype::f32, tokens, hidden, hidden};
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  expect_cuda(cudaStreamCreate(&stream));
  expect_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int layer = 0; layer < 2; ++layer) {
    ASSERT_TRUE(route::launch_slots(routed.args, stream).ok());
    ASSERT_TRUE(route::launch_gather({p, tokens, x.view, routed.args.out, nullptr, rows.get()}, stream).ok());
    ASSERT_TRUE(combine::launch_combine(sum, stream).ok());
  }
  expect_cuda(cudaStreamEndCapture(stream, &graph));
  expect_cuda(cudaGraphInstantiate(&executable, graph, 0));
  for (u64 seed = 1; seed <= 100; ++seed) {
    const Input input = random_logits(p, tokens, seed);
    routed.logits.write(input.logits);
    routed.poison();
    expect_cuda(cudaGraphLaunch(executable, stream));
    const Result host = run_host(p, input, tokens), got = routed.read();
    expect_same(got, host, "replay");
    const std::vector<u16> gathered = rows.read();
    const std::vector<f32> sums = out.read();
    for (i64 slot = 0; slot < host.begin.back(); ++slot) {
      const u8* row = x.host.row(host.slot_pick[slot] / top_k);
      ASSERT_EQ(0, std::memcmp(gathered.data() + slot * hidden, row, 2 * hidden));
    }
    for (i64 i = 0; i < i64{tokens} * hidden; ++i) {
      f32 acc = 0.0f;
      for (i64 pick = i / hidden * top_k; pick < (i / hidden + 1) * top_k; ++pick) {
        acc += got.weights[pick] * z.at(host.pick_slot[pick], i % hidden);
      }
      ASSERT_EQ(sums[i], acc);
    }
  }
  expect_cuda(cudaGraphExecDestroy(executable));
  expect_cuda(cudaGraphDestroy(graph));
  expect_cuda(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace fourmoe::gpu_tests
