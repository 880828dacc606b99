// Book: measured choices, as files hold them. A file is data from outside: what is wrong in it is left out and noted.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "plan.h"

namespace fourmoe::tune {

// What a choice was measured for, in words that are compared as they are.
struct Key {
  std::string machine;  // "NVIDIA H200, 9.0, 132 SMs"
  std::string version;  // of all steps that have variants: "sm90.whole 1, sm90.gemm1 1, sm90.gemm2 1"
  std::string layer;    // "hidden 2048, inter 768, 128 of 128 experts, top-8, gated, nvfp4, w4a16, bf16"

  auto operator<=>(const Key&) const = default;
};

Key key_of(const Problem& problem, const Machine& machine);

struct Measured {
  plan::Choice choice;
  f64 seconds = 0.0;          // of one call, the median; > 0
  f64 default_seconds = 0.0;  // of what would be taken without it, in the same run; > 0

  bool operator==(const Measured&) const = default;
};

// One layer on one machine.
struct Section {
  f64 copy_bytes_per_second = 0.0;  // of the machine in that run, read plus write; 0: unknown
  std::map<i32, Measured> buckets;  // by plan::bucket_of

  bool operator==(const Section&) const = default;
};

using Book = std::map<Key, Section>;

// `name` is the text's in notes. Never throws for what the text holds: a text that is no book is an empty one, an entry
// that is none is left out.
Book parse(std::string_view text, const std::string& name, std::vector<std::string>* notes);
std::string to_text(const Book& book);

// Buckets of `from` replace those of `into`.
void merge(const Book& from, Book* into);

// The choices that are shipped with the library (shipped.json).
const Book& shipped();

// A file that is not there is an empty book; one that cannot be read is noted.
Book load(const std::string& path, std::vector<std::string>* notes);

// Merges the book into the file, which is replaced as a whole; others that store at the same time lose nothing. A file
// that was no book is kept as PATH.invalid. Throws Error: write_failed.
void store(const std::string& path, const Book& book);

}  // namespace fourmoe::tune
