// quantize: a bf16, f16 or f32 checkpoint to ModelOpt's NVFP4 form, a shard at a time.
//
// Codes, scales and globals are those that nvidia-modelopt exports: gate and up of an expert share the global of the
// larger of the two, fused stacks [experts, 2 * inter, hidden] are split into gate_proj, up_proj and down_proj an
// expert, and names of per-expert checkpoints stay. Nothing is calibrated, so there are no input scales and the
// algorithm is W4A16_NVFP4. All other tensors and files are copied as they are. Linear layers outside the routed
// experts are quantised in families where that has been compared with modelopt's export, and refused in others.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "executor.h"

namespace fourmoe::checkpoint {

struct QuantizeProgress {
  std::string_view what;  // file at work
  i64 done = 0;           // bytes of input, each counted once a pass over it
  i64 total = 0;
};

struct QuantizeOptions {
  bool experts_only = true;      // routed experts alone; else attention, shared experts and dense layers too
  bool force = false;            // replace an output that holds nothing but an earlier checkpoint
  std::string producer_version;  // recorded in the output
  Executor* executor = nullptr;  // null: the process's oneTBB executor
  std::function<void(const QuantizeProgress&)> progress;  // called often; may throw to give up; may be empty
};

struct QuantizeResult {
  i64 layers = 0;        // with quantised experts
  i64 matrices = 0;      // quantised
  i64 bytes_before = 0;  // of these
  i64 bytes_after = 0;   // scales included
  i64 tensors_kept = 0;
  i64 files = 0;                   // written, of all kinds
  i64 bytes_written = 0;           // of all tensors
  i64 weights = 0;                 // quantised values
  std::vector<std::string> notes;  // what the user should know, one line each

  f64 bits_before() const { return 8.0 * static_cast<f64>(bytes_before) / static_cast<f64>(weights); }
  f64 bits_after() const { return 8.0 * static_cast<f64>(bytes_after) / static_cast<f64>(weights); }
};

// Writes folder `out` from folder `in`. All names, dtypes and shapes are checked before anything is written; output
// grows in a hidden folder beside `out`, which is renamed at the end and removed on any error. At most one matrix is
// held in memory beside the mapped input. Throws Error: file_exists, file_malformed, family_unknown, tensor_missing,
// tensor_mismatch, dtype_unsupported, shape_unsupported, value_not_finite (tensor and index), write_failed.
QuantizeResult quantize(const std::filesystem::path& in, const std::filesystem::path& out,
                        const QuantizeOptions& options);

}  // namespace fourmoe::checkpoint
