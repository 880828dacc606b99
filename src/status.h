// Status: how a call ended, and the closed list of reasons for which fourmoe refuses.
//
// A refusal is a Reason plus a sentence that names the tensor, the expert, what was expected and what was
// found. Loading throws Error; the contracts (can, bind, run) return Verdict or Status and never throw.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace fourmoe {

// One sentence each in reason_text(). Values are stable: they cross the C ABI as status codes.
enum class Reason : int {
  ok = 0,

  // files
  file_unreadable = 1,
  file_malformed = 2,
  file_exists = 3,
  tensor_missing = 4,
  tensor_mismatch = 5,
  scale_invalid = 6,
  global_invalid = 7,
  family_unknown = 8,
  layer_missing = 9,
  write_failed = 10,

  // the problem
  shape_unsupported = 20,
  experts_unsupported = 21,
  picks_unsupported = 22,
  precision_unsupported = 23,
  encoding_unsupported = 24,
  routing_unsupported = 25,
  activation_unsupported = 26,

  // the machine
  instruction_missing = 40,
  not_built = 41,
  not_asked_for = 42,
  device_missing = 43,

  // the call
  argument_invalid = 60,
  dtype_unsupported = 61,
  stride_unsupported = 62,
  pick_out_of_range = 63,
  value_not_finite = 64,
  workspace_too_small = 65,
  no_plan = 66,
  memory_misplaced = 67,

  out_of_memory = 90,
  internal = 91,
  device_failed = 92,
};

// The stable name of a reason, as `explain` and the C ABI print it.
constexpr std::string_view reason_name(Reason reason) {
  switch (reason) {
    case Reason::ok: return "ok";
    case Reason::file_unreadable: return "file_unreadable";
    case Reason::file_malformed: return "file_malformed";
    case Reason::file_exists: return "file_exists";
    case Reason::tensor_missing: return "tensor_missing";
    case Reason::tensor_mismatch: return "tensor_mismatch";
    case Reason::scale_invalid: return "scale_invalid";
    case Reason::global_invalid: return "global_invalid";
    case Reason::family_unknown: return "family_unknown";
    case Reason::layer_missing: return "layer_missing";
    case Reason::write_failed: return "write_failed";
    case Reason::shape_unsupported: return "shape_unsupported";
    case Reason::experts_unsupported: return "experts_unsupported";
    case Reason::picks_unsupported: return "picks_unsupported";
    case Reason::precision_unsupported: return "precision_unsupported";
    case Reason::encoding_unsupported: return "encoding_unsupported";
    case Reason::routing_unsupported: return "routing_unsupported";
    case Reason::activation_unsupported: return "activation_unsupported";
    case Reason::instruction_missing: return "instruction_missing";
    case Reason::not_built: return "not_built";
    case Reason::not_asked_for: return "not_asked_for";
    case Reason::device_missing: return "device_missing";
    case Reason::argument_invalid: return "argument_invalid";
    case Reason::dtype_unsupported: return "dtype_unsupported";
    case Reason::stride_unsupported: return "stride_unsupported";
    case Reason::pick_out_of_range: return "pick_out_of_range";
    case Reason::value_not_finite: return "value_not_finite";
    case Reason::workspace_too_small: return "workspace_too_small";
    case Reason::no_plan: return "no_plan";
    case Reason::memory_misplaced: return "memory_misplaced";
    case Reason::out_of_memory: return "out_of_memory";
    case Reason::internal: return "internal";
    case Reason::device_failed: return "device_failed";
  }
  return "unknown";
}

// What a reason means, one sentence.
constexpr std::string_view reason_text(Reason reason) {
  switch (reason) {
    case Reason::ok: return "accepted";
    case Reason::file_unreadable: return "the file cannot be opened or mapped";
    case Reason::file_malformed: return "the file's contents contradict its format";
    case Reason::file_exists: return "the output exists and would be replaced";
    case Reason::tensor_missing: return "the checkpoint lacks a tensor that the layer needs";
    case Reason::tensor_mismatch: return "a tensor has another dtype or shape than its role demands";
    case Reason::scale_invalid: return "a block scale is NaN or negative";
    case Reason::global_invalid: return "a global scale is not finite and positive";
    case Reason::family_unknown: return "no known family of models names its experts like this";
    case Reason::layer_missing: return "the layer has no experts or does not exist";
    case Reason::write_failed: return "the output cannot be written";
    case Reason::shape_unsupported: return "hidden and intermediate sizes must be positive multiples of 16";
    case Reason::experts_unsupported: return "the number of experts must be 1 to 1024";
    case Reason::picks_unsupported: return "top-k must be 1 to 32 and at most the number of experts";
    case Reason::precision_unsupported: return "the step does not compute in this precision";
    case Reason::encoding_unsupported: return "the step does not read weights of this encoding";
    case Reason::routing_unsupported: return "the routing is contradictory or not computed by this step";
    case Reason::activation_unsupported: return "the step does not compute this activation";
    case Reason::instruction_missing: return "the machine lacks the instructions that the step needs";
    case Reason::not_built: return "this build does not contain the step";
    case Reason::not_asked_for: return "another backend or another device was asked for";
    case Reason::device_missing: return "the machine has no such GPU";
    case Reason::argument_invalid: return "an argument is null, negative or contradicts another";
    case Reason::dtype_unsupported: return "a tensor argument has an element type that is not accepted";
    case Reason::stride_unsupported: return "the rows of a tensor overlap or are not contiguous";
    case Reason::pick_out_of_range: return "an expert id is neither -1 nor an expert of the layer";
    case Reason::value_not_finite: return "a router logit is NaN or +infinity, or all of a token's are -infinity";
    case Reason::workspace_too_small: return "the workspace is smaller than the plan needs";
    case Reason::no_plan: return "no sequence of accepted steps covers the layer";
    case Reason::memory_misplaced:
      return "a tensor lies in another memory than it must: the host's, a GPU's or another GPU's";
    case Reason::out_of_memory: return "an allocation failed";
    case Reason::internal: return "a fault of fourmoe itself";
    case Reason::device_failed: return "the GPU or its driver reported an error";
  }
  return "unknown";
}

// How a call ended. `detail` is empty when ok and else one readable line.
struct Status {
  Reason reason = Reason::ok;
  std::string detail;

  bool ok() const { return reason == Reason::ok; }
};

inline Status refuse(Reason reason, std::string detail) { return {reason, std::move(detail)}; }

// What loading throws and the C++ face rethrows; what() is the detail.
class Error : public std::runtime_error {
 public:
  Error(Reason reason, const std::string& detail) : std::runtime_error(detail), reason_(reason) {}
  explicit Error(const Status& status) : Error(status.reason, status.detail) {}
  Reason reason() const { return reason_; }

 private:
  Reason reason_;
};

inline void throw_unless_ok(const Status& status) {
  if (!status.ok()) throw Error(status);
}

}  // namespace fourmoe
