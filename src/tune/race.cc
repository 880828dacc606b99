#include "tune/race.h"

#include <algorithm>
#include <cmath>

namespace fourmoe::tune {
namespace {

constexpr i32 kEarly = 3;  // runs after which the slow ones are given up
constexpr f64 kSlow = 1.2;
constexpr f64 kGain = 0.98;  // two runs of one kernel differ by less on an H200 under load

f64 quantile(std::vector<f64> values, f64 q) {
  if (values.empty()) return 0.0;
  const auto at = static_cast<std::ptrdiff_t>(q * static_cast<f64>(values.size() - 1) + 0.5);
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<std::size_t>(at)];
}

struct Runner {
  std::vector<f64> samples;  // none: it cannot run
  bool running = true;

  f64 median() const { return quantile(samples, 0.5); }
  void run(std::size_t candidate, const Timer& timer) {
    if (!running) return;
    samples.push_back(timer(candidate));
    if (std::isfinite(samples.back()) && samples.back() > 0.0) return;
    running = false;
    samples.clear();
  }
};

// By its runs so far; the first where nobody has any.
std::size_t fastest(const std::vector<Runner>& runners) {
  std::size_t best = 0;
  for (std::size_t c = 1; c < runners.size(); ++c) {
    if (runners[c].samples.empty()) continue;
    if (runners[best].samples.empty() || runners[c].median() < runners[best].median()) best = c;
  }
  return best;
}

// A second, fresh comparison with the first candidate: the fastest of many is fast by luck too.
bool confirm(std::size_t candidate, i32 rounds, const Timer& timer) {
  Runner standing, challenger;
  for (i32 round = 0; round < rounds; ++round) {
    standing.run(0, timer);
    challenger.run(candidate, timer);
  }
  return beats(challenger.samples, standing.samples);
}

}  // namespace

bool beats(const std::vector<f64>& challenger, const std::vector<f64>& standing) {
  if (challenger.empty() || challenger.size() != standing.size()) return false;
  std::vector<f64> ratios;
  for (std::size_t i = 0; i < challenger.size(); ++i) ratios.push_back(challenger[i] / standing[i]);
  const bool by_pairs = quantile(ratios, 0.5) <= kGain && quantile(ratios, 0.75) < 1.0;
  return by_pairs || quantile(challenger, 0.75) < quantile(standing, 0.25);
}

Placing race(std::size_t candidates, i32 rounds, const Timer& timer) {
  std::vector<Runner> runners(candidates);
  for (i32 round = 1; round <= rounds; ++round) {
    for (std::size_t c = 0; c < candidates; ++c) runners[c].run(c, timer);
    if (round != kEarly) continue;
    const f64 limit = kSlow * runners[fastest(runners)].median();
    for (std::size_t c = 1; c < candidates; ++c) runners[c].running &= runners[c].median() <= limit;
  }
  Placing placing;
  for (const Runner& runner : runners) placing.seconds.push_back(runner.median());
  const std::size_t best = fastest(runners);
  const bool better = best != 0 && beats(runners[best].samples, runners[0].samples);
  if (better && confirm(best, rounds, timer)) placing.winner = best;
  return placing;
}

}  // namespace fourmoe::tune
