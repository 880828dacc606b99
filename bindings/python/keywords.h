// Keywords: a dictionary of arguments by name. Python's own functions (python/fourmoe) state names and defaults; this
// reads them, and names the argument whose type is wrong.
#pragma once

#include <fmt/format.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "status.h"

namespace fourmoe::python {

namespace nb = nanobind;

class Keywords {
 public:
  explicit Keywords(nb::dict given) : given_(std::move(given)) {}

  bool has(const char* name) const { return given_.contains(name) && !nb::handle(given_[name]).is_none(); }

  // The object, None where it is not given.
  nb::object object(const char* name) const {
    return given_.contains(name) ? nb::borrow(nb::handle(given_[name])) : nb::none();
  }

  template <class T>
  T get(const char* name, T otherwise) const {
    if (!has(name)) return otherwise;
    T value{};
    if (nb::try_cast(given_[name], value)) return value;
    throw Error(Reason::argument_invalid,
                fmt::format("{} is {}, expected {}", name, nb::repr(given_[name]).c_str(), word_of(value)));
  }

 private:
  static const char* word_of(const std::string&) { return "a string"; }
  static const char* word_of(bool) { return "True or False"; }
  static const char* word_of(int) { return "an integer of 32 bits"; }
  static const char* word_of(float) { return "a number"; }

  nb::dict given_;
};

}  // namespace fourmoe::python
