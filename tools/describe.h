// Describe: problems, plans and machines in words and as JSON, the same in every command.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/checkpoint.h"
#include "plan.h"

namespace fourmoe::tools {

using Json = nlohmann::ordered_json;  // keys keep their order

std::string shape_words(const Problem& problem);    // "hidden 128, inter 64, 32 experts, top-4"
std::string routing_words(const Routing& routing);  // "softmax, renormalised"
std::string activation_words(const Activation& activation);
std::string machine_words(const Machine& machine);
std::string device_words(const Device& device);

std::string span_words(const Span& span);                                  // "gemm1", "route..combine"
std::string step_words(const Step& step);                                  // "cpu.gemm1"
std::string steps_words(const plan::Plan& plan);                           // "host.route, cpu.gemm1, ..."
std::string choice_words(const plan::Plan& plan, const Machine& machine);  // what its GEMM steps say of themselves

std::string choice_text(const plan::Choice& choice);  // its rooms' steps, with variants

Json problem_json(const Problem& problem);
Json machine_json(const Machine& machine);
Json steps_json(const plan::Plan& plan);

// The object, indented, with a final newline; what is no UTF-8 (paths may be any bytes) becomes U+FFFD.
std::string json_text(const Json& json);
void print_json(const Json& json);  // on stdout

// Problem of --shape: a name or "H,I,E,k". Throws Error(argument_invalid) naming the known shapes.
Problem parse_shape(const std::string& text);

// The names that parse_shape knows, with where they come from.
struct NamedShape {
  const char* name;
  const char* numbers;  // "H,I,E,k"
  const char* model;
};
std::vector<NamedShape> named_shapes();

Precision parse_precision(const std::string& word);  // checked by the option already

}  // namespace fourmoe::tools
