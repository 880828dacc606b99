// The stage as a step of a GPU: what any GPU's room without a body of its own uses.
#include "args.h"
#include "gpu/runtime.h"
#include "route/device.h"

namespace fourmoe::route {
namespace {

// Codes and scales of the slots' tokens, which only w4a4 makes and nobody reads: rows hold the same values.
i64 code_bytes(const Problem& problem) {
  return problem.precision == Precision::w4a4 ? i64{problem.max_tokens} * problem.top_k * problem.hidden / 2 : 0;
}
i64 scale_bytes(const Problem& problem) { return code_bytes(problem) / 8; }

Verdict can(const Problem&, const Machine& machine) { return gpu::can(machine, 9, 0); }

i64 carve(const Problem& problem, std::byte* scratch, DeviceSlots* slots, Out* out) {
  Carver carver(scratch);
  slots->chunk_counts = reinterpret_cast<u32*>(carver.take<std::byte>(sort_scratch_bytes(problem)));
  out->codes = carver.take<u8>(code_bytes(problem));
  out->scales = carver.take<u8>(scale_bytes(problem));
  return carver.used();
}

i64 bytes(const Problem& problem, const Machine&) {
  DeviceSlots unused;
  Out out;
  return carve(problem, nullptr, &unused, &out);
}

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else {
    const Args& args = *bound.args;
    DeviceSlots slots;
    Out out = args.slots;
    carve(*args.problem, bound.scratch, &slots, &out);
    slots.problem = *args.problem;
    slots.tokens = args.tokens;
    slots.in = args.picks;
    slots.out = args.slots;
    slots.fault = args.fault;
    if (Status status = launch_slots(slots, args.stream); !status.ok()) return status;

    DeviceTokens tokens;
    tokens.problem = *args.problem;
    tokens.tokens = args.tokens;
    tokens.hidden = args.hidden;
    tokens.slots = out;
    tokens.input_scales = args.weights.device->input_scale;
    tokens.rows = args.slots.rows;
    tokens.hidden_scales = args.hidden_scales;
    tokens.fault = args.fault;
    if (!args.hidden_scales.empty()) return launch_decode(tokens, args.stream);
    const bool quantise = args.problem->precision == Precision::w4a4;
    return quantise ? launch_quantise(tokens, args.stream) : launch_gather(tokens, args.stream);
  }
}

}  // namespace

// Here and not beside the kernels: plans are sized in builds without CUDA too.
i64 sort_scratch_bytes(const Problem& problem) { return i64{kMaxChunks} * problem.local_experts * 4; }

extern const Step kDeviceStep;
const Step kDeviceStep = {"device", "route",      {Stage::route, Stage::route}, can, bytes, run, nullptr,
                          nullptr,  Place::device};

}  // namespace fourmoe::route
