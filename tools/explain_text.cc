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

f64 Explained::floor(const tune::Sized& size) const {
  if (copy_bytes_per_second == 0.0) return 0.0;
  return tune::expected_bytes(size.plan.problem, size.plan.problem.max_tokens) / copy_bytes_per_second;
}

Explained explain(const std::string& what, const Problem& problem, const Machine& target, const std::string& backend,
                  const std::optional<std::string>& tuning) {
  Explained layer;
  layer.what = what;
  tune::Known known(tuning);
  layer.status = tune::Sizes::make(problem, target, {backend, {}, {}}, &known, &layer.sizes);
  if (layer.sizes.all().size() > 1) layer.copy_bytes_per_second = tune::copy_bytes_per_second(problem, target, &known);
  layer.notes = known.notes();
  return layer;
}

namespace {

// Of each size: the plan, why, and what is known of its time.
std::string sizes_text(const Explained& layer) {
  Table table({"tokens", "plan", "by", ">floor us", ">measured us"});
  i32 from = 1;
  for (const tune::Sized& size : layer.sizes.all()) {
    const i32 to = size.plan.problem.max_tokens;
    const f64 floor = layer.floor(size);
    table.add({from == to ? fmt::format("{}", to) : fmt::format("{} to {}", from, to),
               choice_text(plan::choice_of(size.plan)), std::string(tune::source_name(size.source)),
               floor == 0.0 ? "-" : fmt::format("{:.1f}", 1e6 * floor),
               size.measured ? fmt::format("{:.1f}", 1e6 * size.measured->seconds) : "-"});
    from = to + 1;
  }
  return table.text();
}

}  // namespace

std::string explain_text(const Explained& layer) {
  const plan::Plan& plan = layer.plan();
  const Problem& p = plan.problem;
  Facts facts;
  facts.add("machine", machine_words(machine()));
  for (const Device& device : machine().devices) facts.add("device", device_words(device));
  facts.add("layer", layer.what);
  facts.add("problem", fmt::format("{}, {}, {}, {}", shape_words(p), activation_words(p.activation),
                                   format::encoding_name(p.encoding), precision_name(p.precision)));
  facts.add("routing", routing_words(p.routing));
  facts.add("tokens", fmt::format("up to {}", p.max_tokens));
  facts.add("plan", layer.status.ok() ? steps_words(plan) : "none");
  if (layer.status.ok()) facts.add("workspace", bytes_text(layer.sizes.workspace_bytes()));
  for (const std::string& note : layer.notes) facts.add("note", note);
  Table table({"step", "stages", "verdict", "detail"});
  for (const plan::Candidate& c : plan.candidates) {
    table.add({step_words(*c.step), span_words(c.step->span), verdict_words(c), detail_words(c, p, plan.machine)});
  }
  const std::string sizes = layer.sizes.all().size() > 1 ? sizes_text(layer) + "\n" : "";
  return fmt::format("{}\n{}{}", facts.text(), sizes, table.text());
}

}  // namespace fourmoe::tools
