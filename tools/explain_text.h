// What `fourmoe explain` prints, as text: the Python package's Layer.explain() gives the same.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "tune/sizes.h"

namespace fourmoe::tools {

// "chosen", "accepts" or the reason; and the step's choice or the sentence of its refusal.
std::string verdict_words(const plan::Candidate& candidate);
std::string detail_words(const plan::Candidate& candidate, const Problem& problem, const Machine& target);

// A layer's plans and where they come from.
struct Explained {
  std::string what;  // names the layer
  Status status;     // of the largest plan
  tune::Sizes sizes;
  f64 copy_bytes_per_second = 0.0;  // 0: unknown
  std::vector<std::string> notes;

  const plan::Plan& plan() const { return sizes.most(); }
  // Seconds that a size's weights take at the copy rate; 0: unknown.
  f64 floor(const tune::Sized& size) const;
};

// tuning: see LayerOptions.
Explained explain(const std::string& what, const Problem& problem, const Machine& machine, const std::string& backend,
                  const std::optional<std::string>& tuning);

// Ends with a newline.
std::string explain_text(const Explained& layer);

}  // namespace fourmoe::tools
