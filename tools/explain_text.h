// What `fourmoe explain` prints, as text: the Python package's Layer.explain() gives the same.
#pragma once

#include <string>

#include "plan.h"

namespace fourmoe::tools {

// "chosen", "accepts" or the reason; and the step's choice or the sentence of its refusal.
std::string verdict_words(const plan::Candidate& candidate);
std::string detail_words(const plan::Candidate& candidate, const Problem& problem, const Machine& target);

// The plan of the smallest calls where it is another; without steps elsewhere. Throws Error.
plan::Plan plan_few(const plan::Plan& plan);

// `what` names the layer; status is plan::make's. Ends with a newline.
std::string explain_text(const std::string& what, const plan::Plan& plan, const Status& status);

}  // namespace fourmoe::tools
