// inspect of a checkpoint of 500 GB class: headers and scalars alone are read, within 2 s and 200 MB.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "checkpoint/checkpoint.h"
#include "scratch.h"

namespace fourmoe::checkpoint {
namespace {

// Kimi-K2's routed experts: 60 layers of 384 experts, hidden 7168, intermediate 2048; 276,481 tensors, 571 GB.
constexpr i32 kFirstLayer = 1, kLayers = 60, kExperts = 384, kShards = 64;
constexpr i64 kHidden = 7168, kInter = 2048;

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // g++
constexpr bool kSanitized = true;
#elif defined(__has_feature)  // clang
constexpr bool kSanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool kSanitized = false;
#endif

// One shard as a sparse file: a real header, scalars where they belong, holes for the weights.
class SparseShard {
 public:
  void add(const std::string& name, const char* dtype, const std::string& shape, i64 bytes, f32 value = 0.0f) {
    header_ += (header_.empty() ? "{\"" : ",\"") + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
               ",\"data_offsets\":[" + std::to_string(offset_) + "," + std::to_string(offset_ + bytes) + "]}";
    if (value != 0.0f) values_.emplace_back(offset_, value);
    offset_ += bytes;
  }

  void write(const std::filesystem::path& path) {
    if (header_.empty()) header_ = "{";
    header_ += "}";
    const u64 length = header_.size();
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << header_;
    for (const auto& [offset, value] : values_) {
      out.seekp(8 + static_cast<std::streamoff>(length) + offset);
      out.write(reinterpret_cast<const char*>(&value), 4);
    }
    out.close();
    std::filesystem::resize_file(path, 8 + length + static_cast<u64>(offset_));
  }

 private:
  std::string header_;
  std::vector<std::pair<i64, f32>> values_;
  i64 offset_ = 0;
};

std::string shape(i64 rows, i64 cols) { return "[" + std::to_string(rows) + "," + std::to_string(cols) + "]"; }

void add_projection(SparseShard* shard, const std::string& name, i64 rows, i64 cols) {
  // Scalars lie together, as writers that sort by size place them.
  shard->add(name + ".input_scale", "F32", "[]", 4, 0.01f);
  shard->add(name + ".weight_scale_2", "F32", "[]", 4, 0.002f);
  shard->add(name + ".weight_scale", "F8_E4M3", shape(rows, cols / 16), rows * cols / 16);
  shard->add(name + ".weight", "U8", shape(rows, cols / 2), rows * cols / 2);
}

void write_checkpoint(const std::filesystem::path& folder) {
  std::vector<SparseShard> shards(kShards);
  std::ofstream index(folder / "model.safetensors.index.json");
  index << "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"end\":\"model-0.safetensors\"";
  shards[0].add("end", "U8", "[1]", 1);
  for (i32 layer = 0; layer < kLayers; ++layer) {
    for (i32 expert = 0; expert < kExperts; ++expert) {
      const i32 number = (layer * kExperts + expert) * kShards / (kLayers * kExperts);
      const std::string base =
          "model.layers." + std::to_string(layer + kFirstLayer) + ".mlp.experts." + std::to_string(expert) + ".";
      for (const char* projection : {"gate_proj", "up_proj", "down_proj"}) {
        const bool down = projection[0] == 'd';
        const std::string name = base + projection;
        add_projection(&shards[static_cast<std::size_t>(number)], name, down ? kHidden : kInter,
                       down ? kInter : kHidden);
        for (const char* ending : {".input_scale", ".weight_scale_2", ".weight_scale", ".weight"}) {
          index << ",\"" << name << ending << "\":\"model-" << number << ".safetensors\"";
        }
      }
    }
  }
  index << "}}";
  for (i32 s = 0; s < kShards; ++s) {
    shards[static_cast<std::size_t>(s)].write(folder / ("model-" + std::to_string(s) + ".safetensors"));
  }
  std::ofstream(folder / "config.json")
      << R"({"model_type":"kimi_k2","hidden_size":7168,"moe_intermediate_size":2048,"n_routed_experts":384,)"
      << R"("num_experts_per_tok":8,"n_group":1,"topk_group":1,"topk_method":"noaux_tc","scoring_func":"sigmoid",)"
      << R"("norm_topk_prob":true,"routed_scaling_factor":2.5,"hidden_act":"silu","num_hidden_layers":61,)"
      << R"("quantization_config":{"quant_method":"modelopt","quant_algo":"NVFP4"}})";
}

// Of this process, user and system: what inspect takes, whatever else the machine does meanwhile. It uses one thread.
f64 processor_seconds() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) { return static_cast<f64>(time.tv_sec) + 1e-6 * time.tv_usec; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Outcome {
  f64 seconds = 0;
  i64 peak_kib = 0;  // of the whole process: the test's own memory is small
  i64 layers = 0, tensors = 0, bytes = 0;
  i32 odd = 0;
};

// In a process of its own, so that the peak is of inspect and not of other tests.
Outcome measure(const std::filesystem::path& folder) {
  int ends[2];
  if (::pipe(ends) != 0) return {};
  const pid_t child = ::fork();
  if (child == 0) {
    Outcome out;
    try {
      const f64 start = processor_seconds();
      const Info info = Checkpoint::open(folder).inspect();
      out.seconds = processor_seconds() - start;
      out.layers = static_cast<i64>(info.layers.size());
      out.tensors = info.tensors;
      out.bytes = info.bytes;
      for (const LayerInfo& layer : info.layers) {
        out.odd += layer.oddities.inputs_missing + layer.oddities.inputs_zero + layer.oddities.globals_invalid;
      }
      struct rusage usage {};
      ::getrusage(RUSAGE_SELF, &usage);
      out.peak_kib = usage.ru_maxrss;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
    }
    ::_exit(::write(ends[1], &out, sizeof out) == sizeof out ? 0 : 1);
  }
  Outcome out;
  ::close(ends[1]);
  EXPECT_EQ(::read(ends[0], &out, sizeof out), static_cast<ssize_t>(sizeof out));
  ::close(ends[0]);
  int status = 0;
  ::waitpid(child, &status, 0);
  return out;
}

TEST(LargeCheckpoint, inspect_reads_headers_and_scalars_only) {
  const test::Scratch scratch;
  write_checkpoint(scratch.path());
  const Outcome outcome = measure(scratch.path());
  RecordProperty("milliseconds", static_cast<int>(outcome.seconds * 1000));
  RecordProperty("peak_mb", static_cast<int>(outcome.peak_kib / 1024));
  EXPECT_EQ(outcome.layers, kLayers);
  EXPECT_EQ(outcome.tensors, i64{kLayers} * kExperts * 12 + 1);
  EXPECT_GT(outcome.bytes, 500'000'000'000);
  EXPECT_EQ(outcome.odd, 0);
  if (kSanitized) GTEST_SKIP() << "sanitizers change time and memory";
  EXPECT_LT(outcome.seconds, 2.0);
  EXPECT_LT(outcome.peak_kib, 200 << 10);
}

}  // namespace
}  // namespace fourmoe::checkpoint
