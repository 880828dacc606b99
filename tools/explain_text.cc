#include "explain_text.h"

#include <fmt/format.h>

#include "describe.h"
#include "machine.h"
#include "quantity.h"
#include "table.h"

namespace fourmoe::tools {

std::string verdict_words(const plan::Candidate& candidate) {
  if (candidate.chosen) return "chosen";
  return candidate.verdict.accepted() ? "accepts" : std::string(reason_name(candidate.verdict.reason));
}

std::string detail_words(const plan::Candidate& candidate, const Problem& problem, const Machine& target) {
  if (!candidate.verdict.accepted()) return candidate.verdict.detail;
  return candidate.step->describe == nullptr ? "" : candidate.step->describe(problem, target);
}

plan::Plan plan_few(const plan::Plan& plan) {
  plan::Plan few;
  if (plan.steps.empty() || plan.problem.max_tokens <= plan::kFewTokens) return few;
  Problem problem = plan.problem;
  problem.max_tokens = plan::kFewTokens;
  throw_unless_ok(plan::make(problem, plan.machine, {plan.backend, {}}, &few));
  if (few.steps == plan.steps) few.steps.clear();
  return few;
}

std::string explain_text(const std::string& what, const plan::Plan& plan, const Status& status) {
  const Problem& p = plan.problem;
  Facts facts;
  facts.add("machine", machine_words(machine()));
  for (const Device& device : machine().devices) facts.add("device", device_words(device));
  facts.add("layer", what);
  facts.add("problem", fmt::format("{}, {}, {}, {}", shape_words(p), activation_words(p.activation),
                                   format::encoding_name(p.encoding), precision_name(p.precision)));
  facts.add("routing", routing_words(p.routing));
  facts.add("tokens", fmt::format("up to {}", p.max_tokens));
  if (status.ok()) {
    facts.add("plan", steps_words(plan));
    const plan::Plan few = plan_few(plan);
    if (!few.steps.empty()) facts.add(fmt::format("up to {} tokens", plan::kFewTokens), steps_words(few));
    facts.add("workspace", bytes_text(plan.workspace_bytes));
  } else {
    facts.add("plan", "none");
  }
  Table table({"step", "stages", "verdict", "detail"});
  for (const plan::Candidate& c : plan.candidates) {
    table.add({step_words(*c.step), span_words(c.step->span), verdict_words(c), detail_words(c, p, plan.machine)});
  }
  return fmt::format("{}\n{}", facts.text(), table.text());
}

}  // namespace fourmoe::tools
