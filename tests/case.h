// Case: one MoE layer with random weights and one call of it. The same object serves tests, `fourmoe verify` and
// `fourmoe bench`: inputs, bound, floating-point operations and bytes.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "layer.h"

namespace fourmoe::cases {

enum class Routes {
  random,      // top_k distinct experts a token, uniform
  skewed,      // expert e with probability ~ 1 / (e + 1)
  one_expert,  // every pick is expert 0 (top_k duplicates of it)
  holes,       // random, about a third of the picks -1
};

struct Spec {
  Problem problem;  // max_tokens is set from tokens
  i32 tokens = 8;
  u64 seed = 1;
  Routes routes = Routes::random;
  f32 amplitude = 1.0f;  // standard deviation of the hidden states
  format::Dtype hidden = format::Dtype::bf16;
  bool biases = false;
  bool by_logits = false;  // a call brings router logits, of which its ids are the best, instead of ids and weights
};

// A plain SwiGLU problem with softmax routing: the usual start of a Spec.
Problem problem(i32 hidden, i32 inter, i32 experts, i32 top_k);
Spec spec(i32 hidden, i32 inter, i32 experts, i32 top_k, i32 tokens);

// Weights with every code and scales over several binades; globals of gate and up differ in every expert (by 1.05 to 2
// times), so that sharing them shows. Values are such that a layer maps unit variance to about unit variance.
checkpoint::Layer random_layer(const Problem& problem, u64 seed, bool biases);

// The memory behind one call's views.
class Call {
 public:
  explicit Call(const Spec& spec);
  LayerCall view(std::vector<u8>* output, format::Dtype dtype) const;  // output is resized to tokens rows and poisoned

  std::vector<u8> hidden;    // [tokens, hidden] spec.hidden
  std::vector<i32> ids;      // [tokens, top_k]
  std::vector<f32> weights;  // [tokens, top_k]
  std::vector<f32> logits;   // [tokens, experts] of by_logits
  Spec spec;
};

// Runs a fresh layer of the spec on a backend and returns the output as f64 [tokens, hidden], rounded to `dtype`.
std::vector<f64> run(const Spec& spec, const LayerOptions& options, format::Dtype dtype = format::Dtype::f32);

// ||a - b|| / ||b||; infinity when a holds a NaN or the sizes differ; 0 when both are zero.
f64 rel_l2(const std::vector<f64>& a, const std::vector<f64>& b);

// Largest rel-L2 of an f32 output against the reference (docs/design.md section 4).
f64 bound(const Problem& problem);

f64 flops(const Problem& problem, i64 picks);     // 2 * picks * projections * H * I
i64 expert_bytes(const Problem& problem);         // weights of one expert, codes and scales
i64 active_experts(const std::vector<i32>& ids);  // distinct ids >= 0

std::string describe(const Spec& spec);

}  // namespace fourmoe::cases
