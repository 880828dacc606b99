// Sizes: the plans of one layer, one for each bucket of tokens. A bucket takes what was measured on this machine, else
// what the shipped table says, else what the rule in code does; a measured choice that this build cannot follow counts
// as none.
#pragma once

#include <optional>

#include "tune/book.h"

namespace fourmoe::tune {

enum class Source : u8 { rule, shipped, tuned };

constexpr std::string_view source_name(Source source) {
  return source == Source::rule ? "rule" : source == Source::shipped ? "shipped" : "tuned";
}

// What this machine's file holds. It is read when a plan first has something to choose.
class Known {
 public:
  // Unset: machine().tuning_path. Empty: no file.
  explicit Known(const std::optional<std::string>& path);

  const Book& tuned();
  const std::vector<std::string>& notes() const { return notes_; }  // what was wrong with the file

 private:
  std::string path_;
  bool read_ = false;
  Book book_;
  std::vector<std::string> notes_;
};

struct Sized {
  plan::Plan plan;  // for calls of up to problem.max_tokens, from the size before; candidates in the last alone
  Source source = Source::rule;
  std::optional<Measured> measured;  // of the choice; not with a rule
};

class Sizes {
 public:
  // For calls of up to problem.max_tokens. A refusal is that of the largest plan, whose candidates say more. A request
  // with pinned steps gets the rule alone, and so does a plan whose steps have no variants: one size for all calls.
  static Status make(const Problem& problem, const Machine& machine, const plan::Request& request, Known* known,
                     Sizes* out);

  bool empty() const { return sizes_.empty(); }
  const std::vector<Sized>& all() const { return sizes_; }  // ascending
  const plan::Plan& most() const { return sizes_.back().plan; }
  const Sized& at(i64 tokens) const;  // tokens <= max_tokens
  i64 workspace_bytes() const;        // the most of all
  i64 kept_bytes() const;             // likewise: plans of one problem keep the same

  // Calls of the bucket of so many tokens follow the choice from now on; empty: the rule. Refuses what plan::make does.
  Status choose(i64 tokens, const plan::Choice& choice);

 private:
  std::size_t index_of(i64 tokens) const;

  plan::Request request_;
  std::vector<Sized> sizes_;
};

// The bytes of weights that a call reads whose tokens pick at random, each its experts once.
f64 expected_bytes(const Problem& problem, i64 tokens);

// As measured with the layer's choices, here or where the shipped table was; 0: unknown.
f64 copy_bytes_per_second(const Problem& problem, const Machine& machine, Known* known);

}  // namespace fourmoe::tune
