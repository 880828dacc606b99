// Plan: covers the flow with steps, sizes the workspace, binds views; never computes.
#pragma once

#include <string>
#include <vector>

#include "args.h"
#include "flow.h"
#include "machine.h"

namespace fourmoe::plan {

// What the caller asks for.
struct Request {
  std::string backend = "auto";  // "auto", or a room: then only its steps and host bodies are taken
  std::vector<const Step*>
      pinned;  // steps that alone may compute the stages they span, whatever their room; may be empty
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
  std::vector<Candidate> candidates;  // every step of list.cc, in its order
  std::string backend;                // room of the chosen GEMMs
  i64 workspace_bytes = 0;            // for problem.max_tokens
};

// The plan is for the host, or for the GPU machine.device. Covers the flow with the first accepted steps of
// backends/list.cc. Fills *out's candidates even when it refuses: no_plan with the reasons of the steps that came
// nearest.
Status make(const Problem& problem, const Machine& machine, const Request& request, Plan* out);

// Runs the plan on args (problem, machine and the views between stages are set here). The workspace is checked, never
// grown; args.tokens may be 0.
Status run(const Plan& plan, Args args, Workspace workspace);

}  // namespace fourmoe::plan
