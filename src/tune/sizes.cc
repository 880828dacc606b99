#include "tune/sizes.h"

#include <algorithm>
#include <cmath>

namespace fourmoe::tune {
namespace {

const Measured* find(const Book& book, const Key& key, i32 bucket) {
  const auto section = book.find(key);
  if (section == book.end()) return nullptr;
  const auto measured = section->second.buckets.find(bucket);
  return measured == section->second.buckets.end() ? nullptr : &measured->second;
}

// Best first. Where sums must keep their order, what was measured without that demand may meet it too.
struct Candidates {
  std::vector<std::pair<Source, const Measured*>> all;

  Candidates(const Problem& problem, const Machine& machine, const Book& tuned) {
    const i32 bucket = plan::bucket_of(problem.max_tokens);
    Problem free = problem;
    free.batch_invariant = false;
    const auto add = [&](Source source, const Book& book, const Problem& p) {
      const Measured* found = find(book, key_of(p, machine), bucket);
      if (found != nullptr) all.emplace_back(source, found);
    };
    add(Source::tuned, tuned, problem);
    if (problem.batch_invariant) add(Source::tuned, tuned, free);
    add(Source::shipped, shipped(), problem);
    if (problem.batch_invariant) add(Source::shipped, shipped(), free);
  }
};

Status make_size(const Problem& problem, const Machine& machine, plan::Request request, const Book* tuned, Sized* out) {
  if (tuned != nullptr) {
    for (const auto& [source, measured] : Candidates(problem, machine, *tuned).all) {
      request.choice = measured->choice;
      out->source = source;
      out->measured = *measured;
      if (plan::make(problem, machine, request, &out->plan).ok()) return {};
    }
  }
  request.choice.clear();
  out->source = Source::rule;
  out->measured.reset();
  return plan::make(problem, machine, request, &out->plan);
}

bool has_variants(const plan::Plan& plan) {
  return std::any_of(plan.steps.begin(), plan.steps.end(), [](const Step* s) { return s->variants != nullptr; });
}

}  // namespace

Known::Known(const std::optional<std::string>& path) : path_(path ? *path : machine().tuning_path) {}

const Book& Known::tuned() {
  if (!read_ && !path_.empty()) book_ = load(path_, &notes_);
  read_ = true;
  return book_;
}

Status Sizes::make(const Problem& problem, const Machine& machine, const plan::Request& request, Known* known,
                   Sizes* out) {
  *out = Sizes{};
  out->request_ = request;
  Sized last;
  if (Status status = plan::make(problem, machine, request, &last.plan); !status.ok()) {
    out->sizes_.push_back(std::move(last));
    return status;
  }
  const bool choose = has_variants(last.plan);
  const Book* tuned = choose && request.pinned.empty() ? &known->tuned() : nullptr;
  Problem smaller = problem;
  i32 next = 1;
  while (choose && next < problem.max_tokens) {
    Sized size;
    smaller.max_tokens = next;
    if (Status status = make_size(smaller, machine, request, tuned, &size); !status.ok()) return status;
    size.plan.candidates = {};
    out->sizes_.push_back(std::move(size));
    next = plan::bucket_of(next + 1);
  }
  if (Status status = make_size(problem, machine, request, tuned, &last); !status.ok()) return status;
  out->sizes_.push_back(std::move(last));
  return {};
}

std::size_t Sizes::index_of(i64 tokens) const {
  const auto smaller = [&](const Sized& size) { return size.plan.problem.max_tokens < tokens; };
  return static_cast<std::size_t>(std::partition_point(sizes_.begin(), sizes_.end() - 1, smaller) - sizes_.begin());
}

const Sized& Sizes::at(i64 tokens) const { return sizes_[index_of(tokens)]; }

i64 Sizes::workspace_bytes() const {
  i64 most = 0;
  for (const Sized& size : sizes_) most = std::max(most, size.plan.workspace_bytes);
  return most;
}

i64 Sizes::kept_bytes() const {
  i64 most = 0;
  for (const Sized& size : sizes_) most = std::max(most, size.plan.kept_bytes);
  return most;
}

Status Sizes::choose(i64 tokens, const plan::Choice& choice) {
  Sized& size = sizes_[index_of(tokens)];
  plan::Request request = request_;
  request.choice = choice;
  Sized next;
  const Problem problem = size.plan.problem;
  if (Status status = plan::make(problem, size.plan.machine, request, &next.plan); !status.ok()) return status;
  if (&size != &sizes_.back()) next.plan.candidates = {};
  size = std::move(next);
  return {};
}

f64 expected_bytes(const Problem& p, i64 tokens) {
  format::Matrix matrix;
  matrix.rows = p.inter;
  matrix.cols = p.hidden;
  matrix.encoding = p.encoding;
  const f64 expert = static_cast<f64>(matrix.bytes()) * (p.activation.gated() ? 3 : 2);
  const f64 missed = std::pow(1.0 - static_cast<f64>(p.top_k) / p.experts, static_cast<f64>(tokens));
  return p.local_experts * (1.0 - missed) * expert;
}

f64 copy_bytes_per_second(const Problem& problem, const Machine& machine, Known* known) {
  const std::string wanted = key_of(problem, machine).machine;
  f64 rate = 0.0;
  for (const Book* book : {&known->tuned(), &shipped()}) {
    for (const auto& [key, section] : *book) {
      if (key.machine == wanted) rate = std::max(rate, section.copy_bytes_per_second);
    }
  }
  return rate;
}

}  // namespace fourmoe::tune
