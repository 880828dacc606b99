// GGUF: every block byte, and damaged files.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>

#include "checkpoint/checkpoint.h"
#include "checkpoint/gguf.h"
#include "checkpoint/gguf_config.h"
#include "format/nvfp4.h"
#include "scratch.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using test::Scratch;

// A writer of the format, for files that no library would write.
class GgufBytes {
 public:
  template <class T>
  void put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_string(const std::string& text) {
    put<u64>(text.size());
    bytes_ += text;
  }
  void put_key(const std::string& key, u32 type) {
    put_string(key);
    put<u32>(type);
  }
  void put_u32(const std::string& key, u32 value) {
    put_key(key, 4);
    put<u32>(value);
  }
  void put_tensor(const std::string& name, const std::vector<u64>& ne, u32 type, u64 offset) {
    put_string(name);
    put<u32>(static_cast<u32>(ne.size()));
    for (const u64 size : ne) put(size);
    put(type);
    put(offset);
  }
  void pad(std::size_t alignment) { bytes_.append((alignment - bytes_.size() % alignment) % alignment, '\0'); }
  void put_data(std::size_t count, char fill) { bytes_.append(count, fill); }
  std::string& bytes() { return bytes_; }

 private:
  std::string bytes_;
};

void put_header(GgufBytes* out, u64 tensors, u64 pairs, u32 version = 3) {
  out->put<u32>(0x46554747);
  out->put(version);
  out->put(tensors);
  out->put(pairs);
}

Gguf parse(const std::string& bytes) {
  return parse_gguf({reinterpret_cast<const u8*>(bytes.data()), bytes.size()}, "x.gguf");
}

void expect_malformed(const std::string& bytes, const std::vector<std::string>& words) {
  try {
    parse(bytes);
    FAIL() << "accepted";
  } catch (const Error& error) {
    const std::string what = error.what();
    EXPECT_EQ(error.reason(), Reason::file_malformed) << what;
    for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " | lacks " << word;
  }
}

std::string one_tensor(const std::vector<u64>& ne, u32 type, u64 offset, std::size_t data) {
  GgufBytes file;
  put_header(&file, 1, 0);
  file.put_tensor("t", ne, type, offset);
  file.pad(32);
  file.put_data(data, 1);
  return file.bytes();
}

TEST(Gguf, reads_all_kinds_of_values) {
  GgufBytes file;
  put_header(&file, 1, 5);
  file.put_u32("a", 7);
  file.put_key("b", 8);
  file.put_string("text");
  file.put_key("c", 9);  // array of strings
  file.put<u32>(8);
  file.put<u64>(2);
  file.put_string("x");
  file.put_string("yy");
  file.put_key("d", 6);
  file.put(1.5f);
  file.put_key("general.alignment", 4);
  file.put<u32>(64);
  file.put_tensor("t", {64, 2}, kGgmlNvfp4, 64);
  file.pad(64);
  const std::size_t data = file.bytes().size();
  file.put_data(64 + 72, 1);
  const Gguf gguf = parse(file.bytes());
  EXPECT_EQ(std::get<i64>(gguf.metadata.at("a")), 7);
  EXPECT_EQ(std::get<std::string>(gguf.metadata.at("b")), "text");
  EXPECT_EQ(std::get<f64>(gguf.metadata.at("d")), 1.5);
  const GgufTensor& tensor = gguf.tensors.at("t");
  EXPECT_EQ(tensor.shape, (std::vector<i64>{2, 64}));
  EXPECT_EQ(tensor.bytes, 72);
  EXPECT_EQ(tensor.offset, static_cast<i64>(data) + 64);
}

TEST(Gguf, refuses_malformed_tables) {
  parse(one_tensor({32}, 0, 0, 128));
  expect_malformed(one_tensor({32}, 0, 0, 127), {"x.gguf", "\"t\"", "128 bytes"});
  expect_malformed(one_tensor({32}, 0, 32, 128), {"\"t\""});
  expect_malformed(one_tensor({32}, 0, 1, 160), {"\"t\"", "alignment"});
  expect_malformed(one_tensor({32}, 0, ~u64{31}, 160), {"\"t\"", "alignment"});
  expect_malformed(one_tensor({32}, 77, 0, 128), {"\"t\"", "type 77"});
  expect_malformed(one_tensor({}, 0, 0, 128), {"\"t\"", "0 dimensions"});
  expect_malformed(one_tensor({1, 1, 1, 1, 1}, 0, 0, 128), {"\"t\"", "5 dimensions"});
  expect_malformed(one_tensor({0}, 0, 0, 128), {"\"t\"", "dimension of 0"});
  expect_malformed(one_tensor({~u64{0}}, 0, 0, 128), {"\"t\"", "dimension of -1"});
  expect_malformed(one_tensor({48}, kGgmlNvfp4, 0, 128), {"\"t\"", "NVFP4", "48"});
  expect_malformed(one_tensor({u64{1} << 40, u64{1} << 40}, 0, 0, 128), {"\"t\"", "overflows"});
}

TEST(Gguf, refuses_overlaps_and_duplicates) {
  const auto two = [](const std::string& second, u64 offset) {
    GgufBytes file;
    put_header(&file, 2, 0);
    file.put_tensor("a", {16}, 0, 0);
    file.put_tensor(second, {16}, 0, offset);
    file.pad(32);
    file.put_data(256, 1);
    return file.bytes();
  };
  parse(two("b", 64));
  expect_malformed(two("b", 32), {"\"a\"", "\"b\"", "overlap"});
  expect_malformed(two("a", 64), {"\"a\"", "twice"});
  GgufBytes keys;
  put_header(&keys, 0, 2);
  keys.put_u32("k", 1);
  keys.put_u32("k", 1);
  expect_malformed(keys.bytes(), {"\"k\"", "twice"});
}

TEST(Gguf, refuses_bad_heads_and_values) {
  expect_malformed("", {"x.gguf"});
  expect_malformed("GGUX", {"GGUF"});
  GgufBytes version;
  put_header(&version, 0, 0, 1);
  expect_malformed(version.bytes(), {"version 1"});
  for (const u64 count : {u64{1}, u64{1} << 40, ~u64{0}}) {
    GgufBytes file;
    put_header(&file, 0, count);
    expect_malformed(file.bytes(), {"key 0"});
    GgufBytes tensors;
    put_header(&tensors, count, 0);
    expect_malformed(tensors.bytes(), {"tensor 0"});
    GgufBytes text;
    put_header(&text, 0, 1);
    text.put(count);
    expect_malformed(text.bytes(), {"bytes are needed"});
    GgufBytes array;
    put_header(&array, 0, 1);
    array.put_key("k", 9);
    array.put<u32>(10);
    array.put(count);
    expect_malformed(array.bytes(), {"\"k\""});
    GgufBytes strings;
    put_header(&strings, 0, 1);
    strings.put_key("k", 9);
    strings.put<u32>(8);
    strings.put(count);
    expect_malformed(strings.bytes(), {"\"k\""});
  }
  for (const u32 type : {13u, 99u}) {
    GgufBytes file;
    put_header(&file, 0, 1);
    file.put_key("k", type);
    expect_malformed(file.bytes(), {"\"k\"", "unknown value type"});
  }
  GgufBytes nested;
  put_header(&nested, 0, 1);
  nested.put_key("k", 9);
  nested.put<u32>(9);
  nested.put<u64>(1);
  expect_malformed(nested.bytes(), {"\"k\"", "array of unknown type 9"});
  for (const u32 alignment : {0u, 3u, 1u << 20}) {
    GgufBytes file;
    put_header(&file, 0, 1);
    file.put_u32("general.alignment", alignment);
    expect_malformed(file.bytes(), {"alignment"});
  }
}

// ggml's own decoding of a block, from its layout: half-split nibbles, doubled E2M1 values, scale halved.
f32 ggml_value(const u8* block, i64 index, bool nvfp4) {
  constexpr std::array<f32, 8> kDoubled = {0, 1, 2, 3, 4, 6, 8, 12};
  const i64 group = nvfp4 ? 16 : 32;
  const u8* nibbles = nvfp4 ? block + 4 + index / 16 * 8 : block + 1;
  const i64 j = index % group;
  const u8 code = j < group / 2 ? nibbles[j] & 15 : nibbles[j - group / 2] >> 4;
  const u8 byte = nvfp4 ? block[index / 16] : block[0];
  const f32 scale = nvfp4 ? (byte == 0x7f ? 0.0f : format::from_e4m3(byte)) : format::from_e8m0(byte);
  return (code & 8 ? -1.0f : 1.0f) * kDoubled[code & 7] * (scale * 0.5f);
}

TEST(Gguf, every_scale_and_code_decodes_as_ggml_does) {
  std::array<u8, 36> block{};
  std::array<u8, 32> codes{};
  std::array<u8, 4> scales{};
  for (i32 scale = 0; scale < 256; ++scale) {
    for (i32 fill = 0; fill < 256; ++fill) {
      for (std::size_t i = 0; i < 4; ++i) block[i] = static_cast<u8>(scale);
      for (std::size_t i = 4; i < 36; ++i) block[i] = static_cast<u8>(fill + 7 * static_cast<i32>(i));
      if (scale < 0x80) {
        ASSERT_EQ(unpack_nvfp4_row(block.data(), 64, codes.data(), scales.data()), -1);
        for (i64 i = 0; i < 64; ++i) {
          const f32 value = format::from_e2m1(format::code_at(codes.data(), i)) * format::from_e4m3(scales[i / 16]);
          ASSERT_EQ(value, ggml_value(block.data(), i, true)) << scale << " " << fill << " " << i;
        }
      } else {
        ASSERT_EQ(unpack_nvfp4_row(block.data(), 64, codes.data(), scales.data()), 0);
      }
      ASSERT_EQ(unpack_mxfp4_row(block.data(), 32, codes.data(), scales.data()), scale == 255 ? 0 : -1);
      if (scale == 255) continue;
      for (i64 i = 0; i < 32; ++i) {
        const f32 value = format::from_e2m1(format::code_at(codes.data(), i)) * format::from_e8m0(scales[0]);
        ASSERT_EQ(value, ggml_value(block.data(), i, false)) << scale << " " << fill << " " << i;
      }
    }
  }
}

// DeepSeek-V2's files score by softmax without saying so; with a selection bias another model is as likely.
TEST(Gguf, refuses_a_selection_bias_of_scores_without_a_name) {
  Gguf gguf;
  gguf.metadata = {{"general.architecture", "deepseek2"},       {"deepseek2.embedding_length", i64{64}},
                   {"deepseek2.expert_count", i64{8}},          {"deepseek2.expert_used_count", i64{2}},
                   {"deepseek2.feed_forward_length", i64{128}}, {"deepseek2.expert_feed_forward_length", i64{64}}};
  EXPECT_EQ(read_gguf_config(gguf, "m.gguf").routing.score, Score::softmax);
  gguf.tensors["blk.1.exp_probs_b.bias"] = {};
  try {
    read_gguf_config(gguf, "m.gguf");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("deepseek2.expert_gating_func"), std::string::npos) << error.what();
  }
  gguf.metadata["deepseek2.expert_gating_func"] = i64{2};
  EXPECT_EQ(read_gguf_config(gguf, "m.gguf").routing.score, Score::sigmoid);
}

// A fixture with one change.
class GgufFaults : public testing::Test {
 protected:
  GgufFaults()
      : good_(test::read_file(std::filesystem::path(FOURMOE_SOURCE_DIR) / "tests/fixtures/gguf-nvfp4.gguf")),
        table_(parse(good_)) {}

  void expect_refused(const std::string& bytes, Reason reason, const std::vector<std::string>& words) {
    test::write_file(scratch_ / "m.gguf", bytes);
    try {
      Checkpoint::open(scratch_ / "m.gguf").load(0, tbb_executor(1));
      FAIL() << "accepted";
    } catch (const Error& error) {
      const std::string what = error.what();
      EXPECT_EQ(reason_name(error.reason()), reason_name(reason)) << what;
      for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " | " << word;
    }
  }

  std::string replace(const std::string& from, const std::string& to) const {
    std::string bytes = good_;
    const std::size_t at = bytes.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return bytes.replace(at, from.size(), to);
  }

  std::string with_byte(const std::string& tensor, i64 offset, u8 byte) const {
    std::string bytes = good_;
    bytes[static_cast<std::size_t>(table_.tensors.at(tensor).offset + offset)] = static_cast<char>(byte);
    return bytes;
  }

  std::string good_;
  Gguf table_;
  Scratch scratch_;
};

TEST_F(GgufFaults, are_refused_by_name) {
  expect_refused(with_byte("blk.0.ffn_up_exps.weight", 36 * 128 + 36 * 3 + 1, 0x80), Reason::scale_invalid,
                 {"m.gguf", "blk.0.ffn_up_exps.weight", "offset", "expert 1, row 3, block 1", "negative"});
  expect_refused(with_byte("blk.0.ffn_up_exps.scale", 7, 0xff), Reason::global_invalid,
                 {"m.gguf", "blk.0.ffn_up_exps.scale", "expert 1"});
  expect_refused(replace("blk.0.ffn_down_exps.weight", "blk.0.ffn_dwwn_exps.weight"), Reason::tensor_missing,
                 {"blk.0.ffn_down_exps.weight"});
  expect_refused(replace("blk.0.ffn_up_exps.weight", "blk.x.ffn_up_exps.weight"), Reason::family_unknown, {"m.gguf"});
  expect_refused(replace("qwen3moe", "qwen9moe"), Reason::family_unknown, {"qwen9moe", "gpt-oss"});
  expect_refused(replace("qwen3moe.expert_count", "qwen3moe.expert_cxunt"), Reason::file_malformed,
                 {"qwen3moe.expert_count", "missing"});
  expect_refused(good_.substr(0, good_.size() - 4096), Reason::file_malformed, {"m.gguf"});
}

TEST_F(GgufFaults, nan_scale_decodes_to_zero) {
  test::write_file(scratch_ / "m.gguf", with_byte("blk.0.ffn_up_exps.weight", 0, 0x7f));
  const Layer layer = Checkpoint::open(scratch_ / "m.gguf").load(0, tbb_executor(1));
  for (i64 c = 0; c < 16; ++c) EXPECT_EQ(format::weight_at(layer.experts[0].up, 0, c), 0.0);
}

TEST_F(GgufFaults, no_truncation_crashes) {
  for (std::size_t size = 0; size < good_.size(); size += 61) {
    EXPECT_THROW(parse(good_.substr(0, size)), Error) << size;
  }
}

}  // namespace
}  // namespace fourmoe::checkpoint
