// Files of measured choices: what is wrong in them is left out, what is stored is never half there or lost.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <thread>

#include "scratch.h"
#include "tune/book.h"

namespace fourmoe::tune {
namespace {

namespace fs = std::filesystem;

Book book_of(const std::string& layer, i32 bucket, f64 seconds) {
  Book book;
  book[{"machine", "version", layer}].buckets[bucket] = {{"sm90.whole 4x1x8:8,8"}, seconds, 2 * seconds};
  return book;
}

struct Read {
  Book book;
  std::vector<std::string> notes;
};

Read read(const std::string& text) {
  Read r;
  r.book = parse(text, "file", &r.notes);
  return r;
}

TEST(Book, ReadsWhatItWrites) {
  Book book = book_of("a", 8, 1.25e-5);
  merge(book_of("b", 1, 3e-6), &book);
  book.begin()->second.copy_bytes_per_second = 4.25e12;
  const Read r = read(to_text(book));
  EXPECT_EQ(r.book, book);
  EXPECT_TRUE(r.notes.empty());
}

TEST(Book, MergesByBucket) {
  Book book = book_of("a", 8, 1e-5);
  merge(book_of("a", 16, 2e-5), &book);
  merge(book_of("a", 8, 3e-5), &book);
  EXPECT_EQ(book.size(), 1u);
  EXPECT_EQ(book.begin()->second.buckets.at(8).seconds, 3e-5);
  EXPECT_EQ(book.begin()->second.buckets.at(16).seconds, 2e-5);
}

TEST(Book, ATruncatedTextIsEmptyAndNoted) {
  Book book = book_of("a", 8, 1e-5);
  const std::string text = to_text(book);
  for (std::size_t length = 1; length + 2 < text.size(); ++length) {
    const Read r = read(text.substr(0, length));
    ASSERT_TRUE(r.book.empty()) << length;
    ASSERT_EQ(r.notes.size(), 1u) << length;
  }
}

TEST(Book, ForeignTextsAreEmptyAndNoted) {
  for (const char* text : {"[]", "1", "null", "{}", R"({"layers": []})", R"({"fourmoe_tuning": 2, "layers": []})",
                           R"({"fourmoe_tuning": "1", "layers": []})", R"({"fourmoe_tuning": 1})",
                           R"({"fourmoe_tuning": 1, "layers": {}})", "\xff\xfe", "\x00"}) {
    const Read r = read(text);
    EXPECT_TRUE(r.book.empty()) << text;
    EXPECT_EQ(r.notes.size(), 1u) << text;
  }
}

// Every value of a sound entry replaced by every wrong one: that entry goes, its neighbour stays, nothing is thrown.
TEST(Book, AWrongEntryIsLeftOutAlone) {
  using nlohmann::json;
  Book book = book_of("a", 8, 1e-5);
  merge(book_of("a", 16, 2e-5), &book);
  const json sound = json::parse(to_text(book));
  const std::vector<std::pair<const char*, std::vector<json>>> wrong = {
      {"tokens", {nullptr, "8", 0, -8, 5, 2.5, 1e300, true, json::array()}},
      {"steps", {nullptr, "sm90.whole", json::array(), {1}, {"a", "b", "c", "d", "e"}, {std::string(300, 'x')}}},
      {"seconds", {nullptr, "1e-5", 0.0, -1e-5, 1e-300, 3e305, json::array(), true}},
      {"default_seconds", {nullptr, 0, -1, "x"}},
  };
  for (const auto& [key, values] : wrong) {
    for (const json& value : values) {
      json damaged = sound;
      damaged["layers"][0]["choices"][0][key] = value;
      const Read r = read(damaged.dump());
      ASSERT_EQ(r.book.size(), 1u) << key << " " << value;
      EXPECT_EQ(r.book.begin()->second.buckets.size(), 1u) << key << " " << value;
      EXPECT_TRUE(r.book.begin()->second.buckets.contains(16));
      ASSERT_EQ(r.notes.size(), 1u) << key << " " << value;
      EXPECT_NE(r.notes[0].find("1 measured choice left out"), std::string::npos) << r.notes[0];
    }
    json damaged = sound;
    damaged["layers"][0]["choices"][0].erase(key);
    EXPECT_EQ(read(damaged.dump()).book.begin()->second.buckets.size(), 1u) << key;
  }
  for (const char* key : {"machine", "version", "layer", "choices"}) {
    json damaged = sound;
    damaged["layers"][0][key] = 7;
    EXPECT_TRUE(read(damaged.dump()).book.empty()) << key;
  }
}

// What is taken at the edges of the bounds is written as something that is taken again.
TEST(Book, ExtremeNumbersSurviveARewrite) {
  for (const f64 seconds : {1e-12, 1e6}) {
    for (const f64 rate : {1.0, 1e18}) {
      nlohmann::json text = nlohmann::json::parse(to_text(book_of("a", 8, 1e-5)));
      text["layers"][0]["choices"][0]["seconds"] = seconds;
      text["layers"][0]["copy_bytes_per_second"] = rate;
      const Read first = read(text.dump());
      ASSERT_TRUE(first.notes.empty()) << first.notes[0];
      const Read again = read(to_text(first.book));
      EXPECT_TRUE(again.notes.empty()) << again.notes[0];
      EXPECT_EQ(again.book.begin()->second.buckets.size(), 1u);
      EXPECT_EQ(again.book.begin()->second.copy_bytes_per_second, rate);
    }
  }
  for (const f64 rate : {0.0, 0.25, -1.0, 1e300}) {
    nlohmann::json text = nlohmann::json::parse(to_text(book_of("a", 8, 1e-5)));
    text["layers"][0]["copy_bytes_per_second"] = rate;
    EXPECT_TRUE(read(text.dump()).book.empty()) << rate;
  }
}

TEST(Book, TimesThatAreNoNumbersAreLeftOut) {
  for (const char* word : {"NaN", "Infinity", "-Infinity", "1e999"}) {
    std::string text = to_text(book_of("a", 8, 0.5));
    text.replace(text.find("0.5"), 3, word);
    const Read r = read(text);
    for (const auto& [key, section] : r.book) EXPECT_TRUE(section.buckets.empty()) << word;
    EXPECT_EQ(r.notes.size(), 1u) << word;
  }
}

TEST(File, AMissingOneIsEmptyAndAnUnreadableOneNoted) {
  const test::Scratch scratch;
  std::vector<std::string> notes;
  EXPECT_TRUE(load((scratch / "no" / "file").string(), &notes).empty());
  EXPECT_TRUE(notes.empty());
  test::write_file(scratch / "empty", "");
  EXPECT_TRUE(load((scratch / "empty").string(), &notes).empty());
  EXPECT_TRUE(notes.empty());
  EXPECT_TRUE(load(scratch.path().string(), &notes).empty());
  EXPECT_EQ(notes.size(), 1u);
  ::mkfifo((scratch / "pipe").c_str(), 0600);  // reading it would wait for ever
  EXPECT_TRUE(load((scratch / "pipe").string(), &notes).empty());
  EXPECT_EQ(notes.size(), 2u);
}

TEST(File, StoringMergesAndMakesTheFolder) {
  const test::Scratch scratch;
  const std::string path = (scratch / "new" / "tuning.json").string();
  store(path, book_of("a", 8, 1e-5));
  store(path, book_of("b", 8, 1e-5));
  std::vector<std::string> notes;
  const Book book = load(path, &notes);
  EXPECT_EQ(book.size(), 2u);
  EXPECT_TRUE(notes.empty());
  for (const auto& entry : fs::directory_iterator(scratch / "new")) {
    EXPECT_EQ(entry.path().string().find("partial"), std::string::npos);
  }
}

TEST(File, WhatWasNoBookIsKept) {
  const test::Scratch scratch;
  const std::string path = (scratch / "tuning.json").string();
  test::write_file(path, "somebody's letter");
  store(path, book_of("a", 8, 1e-5));
  EXPECT_EQ(test::read_file(path + ".invalid"), "somebody's letter");
  EXPECT_EQ(load(path, nullptr).size(), 1u);
}

TEST(File, RefusesWhereNothingCanBeWritten) {
  const test::Scratch scratch;
  test::write_file(scratch / "file", "x");
  for (const fs::path& path : {scratch / "file" / "tuning.json", scratch.path()}) {
    try {
      store(path.string(), book_of("a", 8, 1e-5));
      FAIL() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.reason(), Reason::write_failed);
    }
  }
}

// Threads and processes that tune at once: nobody's choices are lost, and a reader never sees half a file.
TEST(File, StoringAtOnceLosesNothing) {
  const test::Scratch scratch;
  const std::string path = (scratch / "tuning.json").string();
  constexpr int kWriters = 4, kEach = 10;
  std::vector<pid_t> children;
  for (int writer = 0; writer < kWriters; ++writer) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = 0; i < kEach; ++i) store(path, book_of("process " + std::to_string(writer), 1 << i, 1e-5));
      ::_exit(0);
    }
    children.push_back(child);
  }
  std::vector<std::thread> threads;
  for (int writer = 0; writer < kWriters; ++writer) {
    threads.emplace_back([&, writer] {
      for (int i = 0; i < kEach; ++i) store(path, book_of("thread " + std::to_string(writer), 1 << i, 1e-5));
    });
  }
  std::vector<std::string> notes;
  for (int i = 0; i < 200; ++i) load(path, &notes);
  for (std::thread& thread : threads) thread.join();
  for (const pid_t child : children) {
    int status = 1;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_TRUE(notes.empty()) << notes.front();
  const Book book = load(path, &notes);
  ASSERT_EQ(book.size(), 2u * kWriters);
  for (const auto& [key, section] : book)
    EXPECT_EQ(section.buckets.size(), static_cast<std::size_t>(kEach)) << key.layer;
}

}  // namespace
}  // namespace fourmoe::tune
