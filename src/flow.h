// Flow: THE map. A layer is four stages; a step computes a contiguous span of them; a plan is a cover.
//
//   hidden states, logits or picks
//        |
//      route     who goes where: picks (token-expert choices) and slots (rows sorted by expert)
//        |
//      gemm1     gate and up projections, bias, clamp, activation; the result rounded for gemm2
//        |
//      gemm2     down projection and its bias
//        |
//      combine   routing weights, sum back to tokens in a fixed order, plus the shared experts
//        |
//      output
//
// Stage folders hold each stage's contract (route/route.h, gemm1/gemm1.h, ...); backends/ holds rooms with the
// machine's way to meet them; backends/list.cc lists every step; plan.h chooses. Read backends/reference/whole.cc
// next: it is the whole layer in plain double.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "format/tensor.h"
#include "status.h"
#include "workspace.h"

namespace fourmoe {

namespace weights {
struct Order;    // weights/packed.h: how a room of the host wants its weights packed
struct Packing;  // weights/device_packed.h: how a room of a GPU does
}  // namespace weights
struct Args;     // args.h: all views that one call of the layer binds
struct Machine;  // machine.h: what this host can do

enum class Stage : u8 { route, gemm1, gemm2, combine };  // in flow order
inline constexpr std::array<std::string_view, 4> kStageNames = {"route", "gemm1", "gemm2", "combine"};

// Stages first..last, both inclusive.
struct Span {
  Stage first;
  Stage last;
};

enum class Precision : u8 {
  w4a16,      // activations bf16 or f16, weights exact
  w4a4,       // activations and the intermediate quantised to NVFP4: the numerics of native Blackwell
  w4a8_int8,  // those of w4a16, each quantised to int8 in groups of 32 columns: lossy, on the host, only if asked for
};
inline constexpr std::array kPrecisions = {Precision::w4a16, Precision::w4a4, Precision::w4a8_int8};

constexpr std::string_view precision_name(Precision precision) {
  switch (precision) {
    case Precision::w4a16: return "w4a16";
    case Precision::w4a4: return "w4a4";
    case Precision::w4a8_int8: return "w4a8_int8";
  }
  return "unknown";
}

enum class ActivationKind : u8 { swiglu, swiglu_clamped, geglu_erf, geglu_tanh, relu2 };

constexpr std::string_view activation_name(ActivationKind kind) {
  switch (kind) {
    case ActivationKind::swiglu: return "swiglu";
    case ActivationKind::swiglu_clamped: return "swiglu_clamped";
    case ActivationKind::geglu_erf: return "geglu_erf";
    case ActivationKind::geglu_tanh: return "geglu_tanh";
    case ActivationKind::relu2: return "relu2";
  }
  return "unknown";
}

// Formulas in gemm1/activation.h. relu2 has no gate: the layer's up projection alone is activated.
struct Activation {
  ActivationKind kind = ActivationKind::swiglu;
  f32 alpha = 1.702f;  // swiglu_clamped: slope of the sigmoid
  f32 beta = 1.0f;     // swiglu_clamped: added to up
  f32 limit = 7.0f;    // swiglu_clamped: gate <= limit, |up| <= limit

  constexpr bool gated() const { return kind != ActivationKind::relu2; }
  bool operator==(const Activation&) const = default;
};

enum class Score : u8 { softmax, sigmoid, sqrt_softplus, none };

constexpr std::string_view score_name(Score score) {
  switch (score) {
    case Score::softmax: return "softmax";
    case Score::sigmoid: return "sigmoid";
    case Score::sqrt_softplus: return "sqrt_softplus";
    case Score::none: return "none";
  }
  return "unknown";
}

// How logits become picks: the parts in the order in which they apply. Formulas in route/route.h.
struct Routing {
  Score score = Score::softmax;
  i32 groups = 1;                // experts are split into this many equal groups ...
  i32 groups_kept = 1;           // ... of which the best are kept before top-k
  i32 group_best = 2;            // a group's score is the sum of its best 1 or 2 experts
  bool renormalise = true;       // weights divided by their sum
  f32 scale = 1.0f;              // then multiplied by this (routed_scaling_factor)
  bool weight_on_input = false;  // weight multiplies the token before gemm1 (Llama-4; needs top_k 1)
};

// What a layer is, apart from its weights' values.
struct Problem {
  i32 hidden = 0;   // H: columns of a token, multiple of 16 (of 32 with MXFP4), at most 2^20
  i32 inter = 0;    // I: intermediate size of one expert, likewise
  i32 experts = 0;  // E of the whole layer, 1..1024
  i32 top_k = 0;    // k, 1..32
  Activation activation;
  Routing routing;
  Precision precision = Precision::w4a16;
  format::Encoding encoding = format::Encoding::nvfp4;  // of the experts' weights
  format::Dtype activations = format::Dtype::bf16;      // bf16 or f16: rounding of tokens and intermediate but in w4a4
  i32 first_expert = 0;  // local experts are [first_expert, first_expert + local_experts)
  i32 local_experts = 0;
  i32 max_tokens = 0;            // T: most tokens in one call of a plan, which is a pass of a layer, >= 0
  bool batch_invariant = false;  // a token's result may not depend, in any bit, on how many others there are
};

// Answer of can(): accepted, or a reason with a sentence that names the value that would pass.
struct Verdict {
  Reason reason = Reason::ok;
  std::string detail;

  bool accepted() const { return reason == Reason::ok; }
};

inline Verdict accept() { return {}; }
inline Verdict reject(Reason reason, std::string detail) { return {reason, std::move(detail)}; }

struct Step;

// One of the ways in which a step can run a problem: a shape of its tiles. Results differ in the order of sums at most.
struct Variant {
  std::string name;  // the same from build to build: files of measured choices hold it
  i32 number = -1;   // what run gets; -1: the step's own rule chooses in each call
};

// A step with its views checked and fixed: all that run needs.
struct Bound {
  const Step* step = nullptr;
  const Args* args = nullptr;    // plan::run's; outlives the call
  std::byte* scratch = nullptr;  // bytes() bytes of the workspace, 64-byte aligned
  std::byte* kept = nullptr;     // kept() bytes of the layer's, 64-byte aligned; null: nothing is kept for this call
  i32 variant = -1;              // a Variant's number
};

// Whose memory a step's arguments and results are in. A plan's steps all have the same place.
enum class Place : u8 { host, device };

// One implementation of a span of stages. `run` allocates nothing that grows with the call, overwrites its outputs
// and touches no row beyond those in use.
struct Step {
  std::string_view room;  // "reference", "cpu", ...; "host" and "device" for bodies in stage folders
  std::string_view name;  // "gemm1", "whole", ...
  Span span;
  Verdict (*can)(const Problem&, const Machine&);  // pure
  i64 (*bytes)(const Problem&, const Machine&);    // scratch for max_tokens
  Status (*run)(const Bound&);
  std::string (*describe)(const Problem&, const Machine&) = nullptr;  // its choice (instruction level, tile), in words
  const weights::Order* order =
      nullptr;  // packing that it reads; null: it reads matrices as the checkpoint stores them
  Place place = Place::host;
  const weights::Packing* packing = nullptr;  // the same for steps of a GPU's room
  // What is worth measuring for calls of so many tokens, the rule's choice first; without those that change the order
  // of sums where the problem is batch_invariant. Null: there is one way.
  std::vector<Variant> (*variants)(const Problem&, const Machine&, i64 tokens) = nullptr;
  i32 revision = 1;  // raised with a change that makes it faster or slower: forgets what was measured before
  // Memory that it keeps between the calls that share a workspace, zeros at first. Null: none.
  i64 (*kept)(const Problem&, const Machine&) = nullptr;
  bool takes_shared = false;  // it computes the layer's shared expert too where Args::shared asks for it
  // Whether the rule takes it before other steps that serve; a choice may take it all the same. Null: always.
  bool (*suits)(const Problem&, const Machine&, i64 tokens) = nullptr;

  // A step of a room, which --backend can name, and not a stage's own body.
  bool in_room() const { return room != "host" && room != "device"; }
};

// Checks that hold for every step; the first thing that plan asks.
Verdict check(const Problem& problem);

}  // namespace fourmoe
