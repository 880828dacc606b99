// Thousands of damaged copies of good checkpoints, from fixed seeds: each is refused with an Error or read; nothing
// else happens. Under the sanitizers this also says that no byte outside the file is touched.
#include <gtest/gtest.h>

#include <random>

#include "checkpoint/checkpoint.h"
#include "model_files.h"
#include "status.h"

namespace fourmoe::checkpoint {
namespace {

namespace fs = std::filesystem;
using test::Scratch;

const fs::path kFixtures = fs::path(FOURMOE_SOURCE_DIR) / "tests/fixtures";

struct Tally {
  i32 refused = 0;
  i32 read = 0;
};

// Everything that a user can do with a checkpoint.
void use(const fs::path& path, Tally* tally) {
  try {
    const Checkpoint checkpoint = Checkpoint::open(path);
    checkpoint.inspect();
    volatile f64 touched = 0.0;  // so that the reads are not left out
    for (const i32 index : checkpoint.layers()) {
      const Layer layer = checkpoint.load(index, tbb_executor(1));
      for (const weights::Expert& expert : layer.experts) {
        for (const format::Matrix* m : {&expert.gate, &expert.up, &expert.down}) {
          if (!m->empty()) touched = format::weight_at(*m, m->rows - 1, m->cols - 1) + format::weight_at(*m, 0, 0);
        }
      }
    }
    static_cast<void>(touched);
    ++tally->read;
  } catch (const Error&) {
    ++tally->refused;
  }
}

// Replaces a few bytes among the first `span`; half of the time by what JSON and numbers are made of.
std::string mutate(const std::string& good, std::size_t span, std::mt19937* random) {
  static const std::string kLetters = "0123456789-\"{}[],:.eEUF_ \\";
  std::string bytes = good;
  const std::size_t changes = 1 + (*random)() % 3;
  for (std::size_t i = 0; i < changes; ++i) {
    const std::size_t place = (*random)() % std::min(span, bytes.size());
    const bool letter = (*random)() % 2 == 0;
    bytes[place] = letter ? kLetters[(*random)() % kLetters.size()] : static_cast<char>((*random)());
  }
  if ((*random)() % 16 == 0) bytes.resize((*random)() % bytes.size());
  return bytes;
}

std::size_t header_span(const std::string& file) {
  return 8 + static_cast<std::size_t>(format::load<u64>(file.data()));
}

constexpr i32 kMutants = 1000;  // of each file

TEST(Mutants, safetensors) {
  std::mt19937 random(1);
  Tally tally;
  for (const char* name : {"modelopt-stacked", "gpt-oss-mxfp4", "ct-nvfp4", "modelopt-llama4", "modelopt-nemotron"}) {
    const Scratch scratch;
    fs::copy(kFixtures / name, scratch.path());
    const std::string good = test::read_file(scratch / "model.safetensors");
    for (i32 i = 0; i < kMutants; ++i) {
      test::write_file(scratch / "model.safetensors", mutate(good, header_span(good), &random));
      use(scratch / "model.safetensors", &tally);
    }
  }
  EXPECT_EQ(tally.read + tally.refused, 5 * kMutants);
  EXPECT_GT(tally.refused, kMutants);
}

TEST(Mutants, configs_and_indices) {
  std::mt19937 random(2);
  Tally tally;
  for (const char* file : {"config.json", "hf_quant_config.json", "model.safetensors.index.json"}) {
    const Scratch scratch;
    fs::copy(kFixtures / "modelopt-qwen3", scratch.path());
    const std::string good = test::read_file(scratch / file);
    for (i32 i = 0; i < kMutants; ++i) {
      test::write_file(scratch / file, mutate(good, good.size(), &random));
      use(scratch.path(), &tally);
    }
  }
  EXPECT_EQ(tally.read + tally.refused, 3 * kMutants);
  EXPECT_GT(tally.refused, kMutants / 2);
}

TEST(Mutants, gguf) {
  std::mt19937 random(3);
  Tally tally;
  for (const char* file : {"gguf-nvfp4.gguf", "gguf-mxfp4.gguf"}) {
    const Scratch scratch;
    const std::string good = test::read_file(kFixtures / file);
    for (i32 i = 0; i < 3 * kMutants; ++i) {
      test::write_file(scratch / "m.gguf", mutate(good, 1200, &random));
      use(scratch / "m.gguf", &tally);
    }
  }
  EXPECT_EQ(tally.read + tally.refused, 6 * kMutants);
  EXPECT_GT(tally.refused, kMutants);
}

}  // namespace
}  // namespace fourmoe::checkpoint
