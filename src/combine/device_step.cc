// The stage as a step of a GPU: what any GPU's room without a body of its own uses.
#include "args.h"
#include "combine/device.h"
#include "gpu/runtime.h"

namespace fourmoe::combine {
namespace {

Verdict can(const Problem&, const Machine& machine) { return gpu::can(machine, 9, 0); }

Status run(const Bound& bound) {
  if constexpr (!gpu::kBuilt) return gpu::not_built();
  else {
    const Args& args = *bound.args;
    DeviceSum sum;
    sum.tokens = args.tokens;
    sum.hidden = args.problem->hidden;
    sum.top_k = args.problem->top_k;
    sum.weight_on_input = args.problem->routing.weight_on_input;
    sum.pick_slot = args.slots.pick_slot;
    sum.weights = args.slots.weights;
    sum.rows = args.partial.rows;
    sum.addend = args.addend;
    sum.out = args.output;
    return launch_combine(sum, args.stream);
  }
}

}  // namespace

extern const Step kDeviceStep;
const Step kDeviceStep = {"device",
                          "combine",
                          {Stage::combine, Stage::combine},
                          can,
                          [](const Problem&, const Machine&) { return i64{0}; },
                          run,
                          nullptr,
                          nullptr,
                          Place::device};

}  // namespace fourmoe::combine
