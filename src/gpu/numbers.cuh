// Numbers that stand for themselves: z of the one launch, and the y of a single token, are emptied while experts are
// picked, and whoever needs a number polls the place where it will be. So nobody waits until stores are known to be
// done, which takes as long as they do, and nothing says that they are. What is polled is whole: a word of 4 bytes is
// stored at once.
#pragma once

#include "gpu/isa/order.cuh"
#include "gpu/values.cuh"

namespace fourmoe::gpu {

// What stands where there is no number yet: two bf16 or an f32 that are NaN of all ones, which no kernel makes.
inline constexpr u32 kNone = ~u32{0};

// Memory of numbers, to be emptied by many warps, a part each.
struct Empties {
  uint4* y;
  uint4* z;
  i32 of_y;  // 16-byte pieces of y
  i32 of_z;  // and of z

  // Of 4 KiB, so that few blocks are waited for; more than there are blocks would be no faster.
  __device__ int parts() const { return min(128, (of_y + of_z + 255) / 256); }

  // A warp.
  __device__ void empty(int part) const {
    const int all = of_y + of_z, share = (all + parts() - 1) / parts(), end = min(all, (part + 1) * share);
    for (int i = part * share + static_cast<int>(threadIdx.x % 32); i < end; i += 32) {
      *(i < of_y ? y + i : z + (i - of_y)) = uint4{kNone, kNone, kNone, kNone};
    }
  }
};

// Pieces of a row on their way to a lane: piece first + 32 j of `row`, zeros from piece `end` on.
template <int kPieces>
struct Pieces {
  uint4 at[kPieces];

  Pieces() = default;
  __device__ __forceinline__ Pieces(int first, int end) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      at[j] = first + 32 * j < end ? uint4{kNone, kNone, kNone, kNone} : uint4{0, 0, 0, 0};
    }
  }

  // Fetches those that are not there; true once all are.
  __device__ __forceinline__ bool fetch(const uint4* row, int first) {
    bool all = true;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      if (!is_number(at[j])) at[j] = isa::load_relaxed(row + first + 32 * j);
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) all = all && is_number(at[j]);
    return all;
  }

  static __device__ bool is_number(const uint4& v) {
    return v.x != kNone && v.y != kNone && v.z != kNone && v.w != kNone;
  }
};

// Two columns of some rows of z, likewise: row slot[i] of `column`; negative for none.
template <int kRows>
struct Pairs {
  uint2 at[kRows];

  __device__ __forceinline__ explicit Pairs(const i32 (&slot)[kRows]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) at[i] = slot[i] < 0 ? uint2{0, 0} : uint2{kNone, kNone};
  }

  __device__ __forceinline__ bool fetch(const Columns<2>* column, i64 stride, const i32 (&slot)[kRows]) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const u32 offset = static_cast<u32>(slot[i]) * static_cast<u32>(stride);
      if (!is_number(at[i])) at[i] = isa::load_relaxed(reinterpret_cast<const uint2*>(column) + offset);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) all = all && is_number(at[i]);
    return all;
  }

  static __device__ bool is_number(const uint2& v) { return v.x != kNone && v.y != kNone; }
};

}  // namespace fourmoe::gpu
