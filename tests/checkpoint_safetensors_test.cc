// The safetensors reader against damaged files, and the writer.
#include <gtest/gtest.h>

#include <cstring>

#include "checkpoint/safetensors.h"
#include "scratch.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

using test::read_file;
using test::Scratch;
using test::write_file;

std::string file_of(const std::string& header, const std::string& data) {
  const u64 length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

TensorMap parse(const std::string& bytes, Metadata* metadata = nullptr) {
  TensorMap out;
  parse_safetensors({reinterpret_cast<const u8*>(bytes.data()), bytes.size()}, "x.safetensors", &out, metadata);
  return out;
}

// Expects file_malformed with all of `words` in its message.
void expect_malformed(const std::string& bytes, const std::vector<std::string>& words) {
  try {
    parse(bytes);
    FAIL() << "accepted: " << bytes.substr(8, 200);
  } catch (const Error& error) {
    EXPECT_EQ(error.reason(), Reason::file_malformed) << error.what();
    const std::string what = error.what();
    EXPECT_NE(what.find("x.safetensors"), std::string::npos) << what;
    EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " lacks " << word;
  }
}

const char* const kGood =
    R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
    R"("b":{"dtype":"U8","shape":[2,4],"data_offsets":[8,16]},"c":{"dtype":"BF16","shape":[],"data_offsets":[16,18]}})";

TEST(Safetensors, reads_a_good_header) {
  Metadata metadata;
  const TensorMap tensors = parse(file_of(kGood, std::string(18, '\1')), &metadata);
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(metadata.at("format"), "pt");
  EXPECT_EQ(tensors.at("b").shape, (std::vector<i64>{2, 4}));
  EXPECT_EQ(tensors.at("b").offset, 8 + static_cast<i64>(std::strlen(kGood)) + 8);
  EXPECT_EQ(tensors.at("c").bytes, 2);
}

TEST(Safetensors, refuses_every_truncation) {
  const std::string good = file_of(kGood, std::string(18, '\1'));
  for (std::size_t size = 0; size < good.size(); ++size) expect_malformed(good.substr(0, size), {});
}

TEST(Safetensors, refuses_bad_header_lengths) {
  for (const u64 length : {u64{0}, u64{1}, u64{1} << 28, ~u64{0}, u64{1} << 63}) {
    std::string bytes = file_of(kGood, std::string(18, '\1'));
    std::memcpy(bytes.data(), &length, 8);
    expect_malformed(bytes, {"offset"});
  }
}

TEST(Safetensors, names_tensor_and_offset) {
  const auto with = [](const std::string& tensor) { return file_of("{\"w\":" + tensor + "}", std::string(16, '\1')); };
  expect_malformed(with(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})"), {"\"w\"", "F33"});
  expect_malformed(with(R"({"dtype":"F32","shape":[2],"data_offsets":[0,24]})"), {"\"w\"", "[0, 24]", "16 bytes"});
  expect_malformed(with(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), {"\"w\"", "[8, 0]"});
  expect_malformed(with(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), {"\"w\"", "needs 12", "hold 8"});
  expect_malformed(with(R"({"dtype":"F4","shape":[3],"data_offsets":[0,1]})"), {"\"w\"", "whole number"});
  expect_malformed(with(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), {"\"w\"", "-2"});
  expect_malformed(with(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), {"\"w\"", "fraction"});
  expect_malformed(with(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})"), {"too large"});
  expect_malformed(with(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]})"), {"\"w\""});
  expect_malformed(with(R"({"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]})"), {"\"w\""});
  expect_malformed(with(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), {"\"w\"", "two numbers"});
  expect_malformed(with(R"({"dtype":"F32","shape":[2]})"), {"\"w\"", "data_offsets"});
  expect_malformed(with(R"({"shape":[2],"data_offsets":[0,8]})"), {"\"w\"", "dtype is missing"});
  expect_malformed(with(R"({"dtype":"F32","data_offsets":[0,8]})"), {"\"w\"", "shape is missing"});
  expect_malformed(with(R"({"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]})"), {"\"w\"", "twice"});
  expect_malformed(with(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1})"), {"\"w\"", "unknown key"});
  expect_malformed(with(R"({"dtype":"F32","shape":[[2]],"data_offsets":[0,8]})"), {"\"w\"", "array"});
  expect_malformed(with(R"({"dtype":null,"shape":[2],"data_offsets":[0,8]})"), {"\"w\"", "null"});
  expect_malformed(with(R"({"dtype":"F32","shape":{"a":1},"data_offsets":[0,8]})"), {"\"w\"", "object"});
  expect_malformed(with(R"(7)"), {"\"w\"", "7"});
  expect_malformed(with(R"([1])"), {"\"w\"", "array"});
}

TEST(Safetensors, refuses_overlaps_and_duplicates) {
  const std::string data(16, '\1');
  expect_malformed(file_of(R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]},)"
                           R"("b":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}})",
                           data),
                   {"\"a\"", "\"b\"", "overlap", "offset"});
  expect_malformed(file_of(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},)"
                           R"("a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}})",
                           data),
                   {"\"a\"", "twice"});
  expect_malformed(file_of(R"({"__metadata__":{},"__metadata__":{}})", data), {"__metadata__", "twice"});
}

TEST(Safetensors, survives_deep_nesting) {
  expect_malformed(file_of("{\"a\":" + std::string(1 << 20, '[') + "}", ""), {"\"a\""});
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"a\":";
  expect_malformed(file_of(objects, ""), {"\"a\""});
}

TEST(Safetensors, escapes_names_in_messages) {
  expect_malformed(file_of("{\"a\\nb\":{\"dtype\":\"F33\",\"shape\":[],\"data_offsets\":[0,0]}}", ""), {"a\\x0ab"});
}

TEST(SafetensorsWriter, round_trips_in_the_order_given) {
  const Scratch scratch;
  const std::vector<f32> a = {1.0f, 2.0f};
  const std::string b = "12345";
  write_safetensors(
      scratch / "t.safetensors",
      {{"z \"quoted\"", "F32", {2}, a.data(), 8}, {"empty", "U8", {0, 4}, nullptr, 0}, {"a", "U8", {5}, b.data(), 5}},
      {{"format", "pt"}});
  Metadata metadata;
  TensorMap tensors;
  const auto file = MappedFile::open(scratch / "t.safetensors");
  parse_safetensors(file, &tensors, &metadata);
  EXPECT_EQ(metadata.at("format"), "pt");
  const StoredTensor& z = tensors.at("z \"quoted\"");
  EXPECT_EQ(z.offset % 8, 0);
  EXPECT_EQ(std::memcmp(z.data(), a.data(), 8), 0);
  EXPECT_EQ(std::memcmp(tensors.at("a").data(), b.data(), 5), 0);
  EXPECT_EQ(tensors.at("a").offset, z.offset + 8);
  EXPECT_EQ(tensors.at("empty").bytes, 0);
}

TEST(SafetensorsWriter, streams_in_pieces_and_leaves_nothing_half_written) {
  const Scratch scratch;
  {
    SafetensorsWriter writer(scratch / "t.safetensors", {{"none", "U8", {0}}, {"a", "U8", {4}}, {"b", "U8", {2}}}, {});
    EXPECT_EQ(writer.data_bytes(), 6);
    writer.append("a", "ab", 2);
    EXPECT_THROW(writer.append("b", "xy", 2), Error);
    EXPECT_THROW(writer.append("a", "xyz", 3), Error);
    EXPECT_THROW(writer.finish(), Error);
  }
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));
  SafetensorsWriter writer(scratch / "t.safetensors", {{"a", "U8", {4}}, {"b", "U8", {2}}}, {});
  writer.append("a", "ab", 2);
  writer.append("a", "cd", 2);
  writer.append("b", "ef", 2);
  EXPECT_FALSE(std::filesystem::exists(scratch / "t.safetensors"));
  writer.finish();
  const std::string bytes = read_file(scratch / "t.safetensors");
  EXPECT_EQ(bytes.substr(bytes.size() - 6), "abcdef");
}

TEST(SafetensorsWriter, refuses_what_cannot_be_stored) {
  const Scratch scratch;
  const auto declare = [&](std::vector<TensorToDeclare> tensors) {
    SafetensorsWriter writer(scratch / "t.safetensors", std::move(tensors), {});
  };
  EXPECT_THROW(declare({{"a", "U8", {1}}, {"a", "U8", {1}}}), Error);
  EXPECT_THROW(declare({{"a", "X8", {1}}}), Error);
  EXPECT_THROW(declare({{"a", "U8", {-1}}}), Error);
  EXPECT_THROW(declare({{"\xff", "U8", {1}}}), Error);
  EXPECT_THROW(SafetensorsWriter(scratch / "no/such/t.safetensors", {}, {}), Error);
  EXPECT_TRUE(std::filesystem::is_empty(scratch.path()));
}

TEST(MappedFile, refuses_what_is_no_file) {
  const Scratch scratch;
  EXPECT_THROW(MappedFile::open(scratch / "missing"), Error);
  EXPECT_THROW(MappedFile::open(scratch.path()), Error);
  write_file(scratch / "short", "1234");
  const auto file = MappedFile::open(scratch / "short");
  char out[8];
  EXPECT_THROW(file->read(0, 8, out), Error);
  EXPECT_THROW(file->read(-1, 2, out), Error);
  TensorMap tensors;
  EXPECT_THROW(parse_safetensors(file, &tensors, nullptr), Error);
}

}  // namespace
}  // namespace fourmoe::checkpoint
