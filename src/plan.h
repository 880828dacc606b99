// Plan: covers the flow with steps, sizes the workspace, binds views; never computes.
#pragma once

#include <string>
#include <vector>

#include "args.h"
#include "flow.h"
#include "machine.h"

namespace fourmoe::plan {

// Calls are planned for by size. A bucket is named by its most tokens: 1, 2, 3, 4, 6, 8, 12, 16, ... With powers of two
// alone what is best for the most of a bucket is up to 13 % from the best for others (docs/hopper.md), with these 3 %.
constexpr i32 bucket_of(i64 tokens) {
  i32 bucket = 1;
  for (; bucket < tokens && bucket < 1 << 30; bucket *= 2) {
    if (bucket > 1 && tokens <= bucket / 2 * 3) return bucket / 2 * 3;
  }
  return bucket;
}

// Steps in flow order, in words: "sm90.gemm1 4x1x4:24,16,8+f3+d4", or without the variant: the step's rule then takes
// one.
using Choice = std::vector<std::string>;

// What the caller asks for.
struct Request {
  std::string backend = "auto";          // "auto", or a room: then only its steps and host bodies are taken
  std::vector<const Step*> pinned = {};  // steps that alone may compute the stages they span, whatever their room
  Choice choice = {};                    // the plan to make; empty: the rule, which is the first that the list offers
};

// One line of `explain`: a step and what became of it.
struct Candidate {
  const Step* step = nullptr;
  Verdict verdict;
  bool chosen = false;
};

struct Plan {
  Problem problem;
  Machine machine;                    // and the device that the plan is for
  std::vector<const Step*> steps;     // in flow order; they cover route..combine
  std::vector<Variant> variants;      // of each step
  std::vector<Candidate> candidates;  // every step of list.cc, in its order
  std::string backend;                // room of the chosen GEMMs
  i64 workspace_bytes = 0;            // for problem.max_tokens
  i64 kept_bytes = 0;                 // that steps keep between the calls that share a workspace, whichever are chosen
  std::vector<i64> kept;              // where each step's part of it begins; -1: it keeps nothing

  bool takes_shared() const;  // a step computes the layer's shared expert with the routed ones
};

// The plan is for the host, or for the GPU machine.device. Covers the flow with the first accepted steps of
// backends/list.cc. Fills *out's candidates even when it refuses: no_plan with the reasons of the steps that came
// nearest, or of a choice that cannot be followed: a step that refuses or is of another room than the rule's, a variant
// that is not built or not worth trying for max_tokens.
Status make(const Problem& problem, const Machine& machine, const Request& request, Plan* out);

// The plan in words; make follows them.
Choice choice_of(const Plan& plan);

// All choices for calls of max_tokens, the rule's first: every cover by steps of its room, with all variants of each.
// None where make refuses.
std::vector<Choice> alternatives(const Problem& problem, const Machine& machine, const Request& request);

// The views of a call, before anything runs: what run() would refuse.
Status check(const Plan& plan, const Args& args);

// Runs the plan on args (problem, machine and the views between stages are set here). The workspace is checked, never
// grown; args.tokens may be 0.
Status run(const Plan& plan, Args args, Workspace workspace);

}  // namespace fourmoe::plan
