// The stage as a step of a GPU: what any GPU's room without a body of its own uses.
#include "args.h"
#include "gpu/runtime.h"
#include "route/device.h"

namespace fourmoe::route {
namespace {

Verdict can(const Problem&, const Machine& machine) { return gpu::can(machine, 9, 0); }

i64 bytes(const Problem& problem, const Machine&) { return sort_scratch_bytes(problem); }

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else {
    const Args& args = *bound.args;
    DeviceSlots slots;
    slots.chunk_counts = reinterpret_cast<u32*>(bound.scratch);
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
    tokens.slots = args.slots;
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
