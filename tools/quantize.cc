// fourmoe quantize: a dense checkpoint to ModelOpt NVFP4.
#include "checkpoint/quantize.h"

#include <fmt/format.h>

#include <chrono>
#include <memory>

#include "command.h"
#include "describe.h"
#include "progress.h"
#include "quantity.h"
#include "table.h"

namespace fourmoe::tools {
namespace {

struct Options {
  std::string in;
  std::string out;
  std::string format = "nvfp4";
  bool experts_only = false;
  bool force = false;
  int threads = 0;
  bool json = false;
};

void print_text(const Options& options, const checkpoint::QuantizeResult& result, f64 seconds) {
  Facts facts;
  facts.add("wrote", fmt::format("{}: {} in {} files", options.out, bytes_text(result.bytes_written), result.files));
  facts.add("experts",
            fmt::format("{} matrices of {} layer{}: {} to {} ({:.2f} bits a weight before, {:.2f} after)",
                        result.matrices, result.layers, result.layers == 1 ? "" : "s", bytes_text(result.bytes_before),
                        bytes_text(result.bytes_after), result.bits_before(), result.bits_after()));
  facts.add("kept", fmt::format("{} tensors as they were", result.tensors_kept));
  facts.add("time", duration_text(seconds));
  facts.add("note", "nothing was calibrated: there are no input scales, the algorithm is W4A16_NVFP4");
  for (const std::string& note : result.notes) facts.add("note", note);
  fmt::print("{}", facts.text());
}

Json result_json(const Options& options, const checkpoint::QuantizeResult& result, f64 seconds) {
  return {{"output", options.out},
          {"algorithm", "W4A16_NVFP4"},
          {"layers", result.layers},
          {"matrices", result.matrices},
          {"bytes_before", result.bytes_before},
          {"bytes_after", result.bytes_after},
          {"tensors_kept", result.tensors_kept},
          {"files", result.files},
          {"bytes_written", result.bytes_written},
          {"seconds", seconds},
          {"notes", result.notes}};
}

int run(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  checkpoint::QuantizeOptions how;
  how.experts_only = options.experts_only;
  how.force = options.force;
  how.producer_version = FOURMOE_VERSION;
  how.executor = &tbb_executor(options.threads);
  checkpoint::QuantizeResult result;
  {
    Progress progress("quantize");
    how.progress = [&](const checkpoint::QuantizeProgress& p) { progress.show_bytes(p.what, p.done, p.total); };
    result = checkpoint::quantize(options.in, options.out, how);
  }
  const f64 seconds = std::chrono::duration<f64>(std::chrono::steady_clock::now() - start).count();
  if (options.json) print_json(result_json(options, result, seconds));
  else print_text(options, result, seconds);
  return kSuccess;
}

}  // namespace

Command add_quantize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = app.add_subcommand("quantize", "turn a bf16, f16 or f32 checkpoint into ModelOpt's NVFP4 form");
  sub->add_option("in", options->in, "folder with config.json and safetensors files")->required()->type_name("IN");
  sub->add_option("--output", options->out, "folder to write")->required()->type_name("OUT");
  sub->add_option("--format", options->format, "form of the output")
      ->type_name("nvfp4")
      ->check(CLI::IsMember({"nvfp4"}).description(""))
      ->capture_default_str();
  sub->add_flag("--experts-only", options->experts_only,
                "quantise the routed experts alone; without it attention, shared experts and dense layers too");
  sub->add_flag("--force", options->force, "replace OUT when it holds nothing but an earlier checkpoint");
  add_threads(sub, &options->threads);
  sub->add_flag("--json", options->json, "print one JSON object");
  sub->footer(
      "Codes and scales are bit-equal to what nvidia-modelopt exports. Nothing is calibrated: there are no input\n"
      "scales, and the output says W4A16_NVFP4.\n\n"
      "Example:\n  fourmoe quantize examples/tiny-moe/bf16 --output /tmp/tiny-nvfp4 --experts-only");
  return {sub, [options] { return run(*options); }};
}

}  // namespace fourmoe::tools
