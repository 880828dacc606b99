// Race: which of several candidates is the fastest, where the first is what would be taken anyway and wins all doubts.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "format/number.h"

namespace fourmoe::tune {

// Runs a candidate once: seconds. What is not finite or not above 0 takes the candidate out of the race.
using Timer = std::function<f64(std::size_t candidate)>;

struct Placing {
  std::size_t winner = 0;
  std::vector<f64> seconds;  // median of each; of one out of the race 0; of one given up early, of its few runs
};

// Candidates take turns, `rounds` (>= 5) times; one that is a fifth slower than the best after three is given up. The
// fastest replaces the first only if it beats it here and again in as many new turns of the two alone.
Placing race(std::size_t candidates, i32 rounds, const Timer& timer);

// By alternated runs, equally many of each: the challenger wins three quarters of the pairs and the median of their
// ratios is 0.98 or less, or three quarters of its runs are below three quarters of the default's.
bool beats(const std::vector<f64>& challenger, const std::vector<f64>& standing);

}  // namespace fourmoe::tune
