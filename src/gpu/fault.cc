#include "gpu/fault.h"

#include <fmt/format.h>

#include "route/route.h"

namespace fourmoe::gpu {

namespace {

std::string awaited(u64 key) {
  switch (fault_awaited(key)) {
    case Awaited::rows: return "the tokens' rows";
    case Awaited::empty: return "memory to be emptied";
    case Awaited::tokens: return fmt::format("gemm1 of local expert {}", fault_of(key));
    case Awaited::sums: return fmt::format("gemm2 of token {}", fault_of(key));
  }
  return "something";
}

}  // namespace

Status to_status(const Fault& fault) {
  const i32 token = fault_token(fault.first);
  switch (fault_kind(fault.first)) {
    case FaultKind::none: return {};
    case FaultKind::logits: return route::refuse_logits(token);
    case FaultKind::scale: return route::refuse_scale(token, fault_position(fault.first), fault_byte(fault.first));
    case FaultKind::wait:
      return refuse(Reason::device_failed,
                    fmt::format("a wait for {} was given up; the call's output is not valid", awaited(fault.first)));
    case FaultKind::id: break;
  }
  if (fault.settled != fault.first) return refuse(Reason::internal, "a fault was read before its stream was done");
  return route::refuse_id(token, fault_position(fault.first), fault.value, fault.experts);
}

}  // namespace fourmoe::gpu
