// model_files: small checkpoints in memory, to be changed in one place and written to a folder.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "scratch.h"

namespace fourmoe::test {

struct TensorBytes {
  std::string dtype;
  std::vector<i64> shape;
  std::string bytes;
};

struct ModelFiles {
  std::string config;
  std::map<std::string, TensorBytes> tensors;

  void add(const std::string& name, const std::string& dtype, const std::vector<i64>& shape, u8 fill) {
    tensors[name] = {
        dtype, shape,
        std::string(static_cast<std::size_t>(checkpoint::tensor_bytes(dtype, shape)), static_cast<char>(fill))};
  }

  void add_f32(const std::string& name, const std::vector<i64>& shape, f32 value) {
    add(name, "F32", shape, 0);
    std::string& bytes = tensors[name].bytes;
    for (std::size_t at = 0; at < bytes.size(); at += 4) std::memcpy(bytes.data() + at, &value, 4);
  }

  // One ModelOpt projection [rows, cols].
  void add_nvfp4(const std::string& name, i64 rows, i64 cols, f32 global = 0.5f, f32 input = 0.25f) {
    add(name + ".weight", "U8", {rows, cols / 2}, 0x21);
    add(name + ".weight_scale", "F8_E4M3", {rows, cols / 16}, 0x38);
    add_f32(name + ".weight_scale_2", {}, global);
    add_f32(name + ".input_scale", {}, input);
  }

  void write(const std::filesystem::path& folder, const std::string& file = "model.safetensors") const {
    std::vector<checkpoint::TensorToWrite> out;
    for (const auto& [name, tensor] : tensors) {
      out.push_back({name, tensor.dtype, tensor.shape, tensor.bytes.data(), static_cast<i64>(tensor.bytes.size())});
    }
    checkpoint::write_safetensors(folder / file, out, {});
    write_file(folder / "config.json", config);
  }
};

inline constexpr i64 kHidden = 32, kInter = 16, kExperts = 4;

inline std::string config_of(const std::string& family, const std::string& more = "") {
  return R"({"model_type":")" + family +
         R"(","hidden_size":32,"moe_intermediate_size":16,"num_experts":4,"num_experts_per_tok":2,"hidden_act":"silu")" +
         more + "}";
}

// Layer `layer` of 4 experts in ModelOpt's names, with a router.
inline void add_qwen3_layer(ModelFiles* files, i32 layer) {
  const std::string base = "model.layers." + std::to_string(layer) + ".mlp.";
  files->add(base + "gate.weight", "BF16", {kExperts, kHidden}, 0);
  for (i64 e = 0; e < kExperts; ++e) {
    const std::string expert = base + "experts." + std::to_string(e) + ".";
    files->add_nvfp4(expert + "gate_proj", kInter, kHidden);
    files->add_nvfp4(expert + "up_proj", kInter, kHidden);
    files->add_nvfp4(expert + "down_proj", kHidden, kInter);
  }
}

inline ModelFiles make_qwen3(const std::vector<i32>& layers = {0}) {
  ModelFiles files;
  files.config = config_of("qwen3_moe", R"(,"norm_topk_prob":true)");
  for (const i32 layer : layers) add_qwen3_layer(&files, layer);
  return files;
}

}  // namespace fourmoe::test
