#include "flow.h"

#include <fmt/format.h>

namespace fourmoe {
namespace {

i32 round_up(i32 value, i32 multiple) { return (value + multiple - 1) / multiple * multiple; }

Verdict check_size(const char* name, i32 value) {
  if (value > 0 && value % 16 == 0 && value <= (1 << 20)) return accept();
  if (value <= 0 || value > (1 << 20)) {
    return reject(Reason::shape_unsupported, fmt::format("{} is {}, expected 16 to 1048576", name, value));
  }
  return reject(Reason::shape_unsupported,
                fmt::format("{} is {}, not a multiple of 16; {} would pass", name, value, round_up(value, 16)));
}

Verdict check_routing(const Problem& problem) {
  const Routing& routing = problem.routing;
  if (routing.groups < 1 || problem.experts % routing.groups != 0) {
    return reject(Reason::routing_unsupported,
                  fmt::format("{} groups do not divide {} experts", routing.groups, problem.experts));
  }
  if (routing.groups_kept < 1 || routing.groups_kept > routing.groups) {
    return reject(Reason::routing_unsupported,
                  fmt::format("{} groups kept, expected 1 to {}", routing.groups_kept, routing.groups));
  }
  if (routing.group_best != 1 && routing.group_best != 2) {
    return reject(Reason::routing_unsupported,
                  fmt::format("a group's score sums its best {} experts, expected 1 or 2", routing.group_best));
  }
  const i32 eligible = problem.experts / routing.groups * routing.groups_kept;
  if (problem.top_k > eligible) {
    return reject(Reason::routing_unsupported,
                  fmt::format("top-k is {}, but the groups kept hold {} experts", problem.top_k, eligible));
  }
  if (routing.weight_on_input && problem.top_k != 1) {
    return reject(Reason::routing_unsupported,
                  fmt::format("routing weight on the input needs top-k 1, found {}", problem.top_k));
  }
  return accept();
}

Verdict check_experts(const Problem& problem) {
  if (problem.experts < 1 || problem.experts > 1024) {
    return reject(Reason::experts_unsupported, fmt::format("{} experts, expected 1 to 1024", problem.experts));
  }
  if (problem.first_expert < 0 || problem.local_experts < 1 ||
      problem.first_expert > problem.experts - problem.local_experts) {
    return reject(Reason::experts_unsupported,
                  fmt::format("local experts {} to {} are not within 0 to {}", problem.first_expert,
                              problem.first_expert + problem.local_experts - 1, problem.experts - 1));
  }
  if (problem.top_k < 1 || problem.top_k > 32 || problem.top_k > problem.experts) {
    return reject(Reason::picks_unsupported, fmt::format("top-k is {}, expected 1 to {}", problem.top_k,
                                                         problem.experts < 32 ? problem.experts : 32));
  }
  return accept();
}

}  // namespace

Verdict check(const Problem& problem) {
  for (const Verdict& verdict : {check_size("hidden size", problem.hidden),
                                 check_size("intermediate size", problem.inter), check_experts(problem)}) {
    if (!verdict.accepted()) return verdict;
  }
  if (problem.encoding == format::Encoding::mxfp4 && (problem.hidden % 32 != 0 || problem.inter % 32 != 0)) {
    return reject(
        Reason::shape_unsupported,
        fmt::format("mxfp4 needs multiples of 32, found hidden {} and intermediate {}", problem.hidden, problem.inter));
  }
  if (problem.precision != Precision::w4a16 && !format::is_fp4(problem.encoding)) {
    return reject(Reason::precision_unsupported,
                  fmt::format("{} needs 4-bit weights, these are {}; w4a16 would pass",
                              precision_name(problem.precision), format::encoding_name(problem.encoding)));
  }
  if (problem.activations != format::Dtype::bf16 && problem.activations != format::Dtype::f16) {
    return reject(Reason::dtype_unsupported,
                  fmt::format("activations are {}, expected bf16 or f16", format::dtype_name(problem.activations)));
  }
  if (problem.max_tokens < 0 || i64{problem.max_tokens} * problem.top_k > (i64{1} << 30)) {
    return reject(Reason::argument_invalid, fmt::format("max_tokens is {}, expected 0 to {}", problem.max_tokens,
                                                        (i64{1} << 30) / problem.top_k));
  }
  return check_routing(problem);
}

}  // namespace fourmoe
