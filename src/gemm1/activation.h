// Activation: what stands between the two GEMMs. One template each, used with double by the reference and with f32 by
// the other rooms.
//
// Order of operations everywhere: accumulator * global scale, + bias, clamp, activation.
// Sources: SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202); the clamped form is gpt-oss's (alpha 1.702, beta 1,
// limit 7); ReLU squared (So et al. 2021, arXiv 2109.08668) as Nemotron uses it, without a gate.
#pragma once

#include <algorithm>
#include <cmath>

#include "flow.h"

namespace fourmoe::gemm1 {

// e^x; a room may have another.
struct Exponential {
  template <class T>
  FOURMOE_HD T operator()(T x) const {
    return std::exp(x);
  }
};

template <class T, class Exp>
FOURMOE_HD T sigmoid(T x, const Exp& exp) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(f32)) return __fdividef(1.0f, 1.0f + exp(-x));  // 2^-21 apart
#endif
  return T(1) / (T(1) + exp(-x));
}

template <class T>
FOURMOE_HD T gelu_erf(T x) {
  return T(0.5) * x * (T(1) + std::erf(x * T(0.70710678118654752440)));  // 1/sqrt(2)
}

template <class T>
FOURMOE_HD T gelu_tanh(T x) {
  return T(0.5) * x * (T(1) + std::tanh(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));  // sqrt(2/pi)
}

// `gate` is ignored by forms without one.
template <class T, class Exp = Exponential>
FOURMOE_HD T activate(const Activation& activation, T gate, T up, const Exp& exp = {}) {
  switch (activation.kind) {
    case ActivationKind::swiglu: return gate * sigmoid(gate, exp) * up;
    case ActivationKind::swiglu_clamped: {
      const T limit = activation.limit;
      const T g = std::min(gate, limit);
      const T u = std::clamp(up, -limit, limit);
      return g * sigmoid(T(activation.alpha) * g, exp) * (u + T(activation.beta));
    }
    case ActivationKind::geglu_erf: return gelu_erf(gate) * up;
    case ActivationKind::geglu_tanh: return gelu_tanh(gate) * up;
    case ActivationKind::relu2: return up <= T(0) ? T(0) : up * up;  // a NaN stays one
  }
  return T(0);
}

}  // namespace fourmoe::gemm1
