// Window: the 127 neighbouring powers of two that scales of an MXFP4 matrix use.
//
// E8M0 has 255 powers of two, the packed scale of a GPU's room has 7 bits. A matrix is packed exactly when its scales
// fit one window: byte E becomes E - first, and the power of two that all have in common joins the matrix's global.
// Blocks whose codes are all zero do not count: any scale serves them.
#pragma once

#include <algorithm>
#include <string>

#include "gpu/runtime.h"
#include "weights/expert_table.h"

namespace fourmoe::weights {

struct Rows;  // device_packed.h

inline constexpr i32 kWindow = 127;
inline constexpr u32 kNotANumber = 255;

// E8M0 bytes that a matrix uses; least > most when it uses none.
struct Exponents {
  u32 least = 255;
  u32 most = 0;

  bool none() const { return least > most; }
  bool fit() const { return none() || (most != kNotANumber && most - least < kWindow); }
  i32 first() const { return none() ? 0 : std::max<i32>(0, static_cast<i32>(most) - kWindow + 1); }  // of the window
};

// The packed bits of an E8M0 byte. Outside of the window, where only blocks of zeros are, its nearest end.
FOURMOE_HD u8 to_power(u8 e8m0, i32 first) {
  const i32 exponent = i32{e8m0} - first;
  return static_cast<u8>(exponent < 0 ? 0 : exponent >= kWindow ? kWindow - 1 : exponent);
}

// Of a matrix in host memory. Codes are read only when the scales alone do not fit.
Exponents find_exponents(const format::Matrix& matrix);

// Of [rows, cols] in device memory: enqueues what raises *found, which begins as zeros. get() is what the host finds.
struct FoundExponents {
  struct Range {
    u32 most;    // E8M0 byte
    u32 behind;  // 255 - least
    Exponents get() const { return {255 - behind, most}; }
  };
  Range all;
  Range used;  // of blocks with a code that is not zero

  Exponents get() const { return all.get().fit() ? all.get() : used.get(); }
};
Status find_exponents(const Rows& matrix, i32 rows, i32 cols, FoundExponents* found, gpu::Stream stream);

// Why they do not fit, in words that follow the matrix's name.
std::string refusal(const Exponents& exponents);

}  // namespace fourmoe::weights
