// gemm1 on Hopper: the epilogue that activates, and the gather that tiles tokens for it. Contract in gemm1/gemm1.h.
#pragma once

#include <cuda_bf16.h>

#include "backends/sm90/tiles.cuh"
#include "gemm1/activation.h"

namespace fourmoe::sm90 {

// Sums to gemm2's tokens, tiled. Where inter does not fill K steps, the last row tile writes the zeros that follow.
struct Activate {
  const f32* scales;     // [experts, 2] global scale of gate and of up, times 2^-kProductExponent
  const f32* gate_bias;  // [experts, inter]; null for none
  const f32* up_bias;    // [experts, inter]; null for none
  Activation activation;
  u8* y;  // tiled bf16 rows of inter columns; overwritten where slots are in use
  i64 step_bytes;
  i32 inter;
  i32 row_tiles;

  template <int kSlots>
  __device__ void store(int expert, int row_tile, int slot, int slots, const f32 (&d)[kSlots / 2]) const {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % 128 / 32;
    const int features = activation.gated() ? 8 : 16;  // of a warp's sixteen rows
    const int first = row_tile * 4 * features + warp * features + lane / 4;
#pragma unroll
    for (int i = 0; i < kSlots / 2; i += 4) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = i / 4 * 8 + lane % 4 * 2 + j;
        if (column >= slots) continue;
        if (activation.gated()) {
          write(expert, slot + column, first, d[i + j], d[i + 2 + j]);
        } else {
          write(expert, slot + column, first, 0.0f, d[i + j]);
          write(expert, slot + column, first + 8, 0.0f, d[i + 2 + j]);
        }
      }
    }
    if (row_tile == row_tiles - 1) write_zeros(slot, slots, row_tiles * 4 * features);
  }

 private:
  __device__ void write(int expert, int slot, int feature, f32 gate, f32 up) const {
    f32 value = 0.0f;
    if (feature < inter) {
      const i64 bias = i64{expert} * inter + feature;
      gate = gate * scales[2 * expert] + (gate_bias != nullptr ? gate_bias[bias] : 0.0f);
      up = up * scales[2 * expert + 1] + (up_bias != nullptr ? up_bias[bias] : 0.0f);
      value = gemm1::activate(activation, gate, up);
    }
    if (feature >= k_steps(inter) * kTileColumns) return;
    u8* chunk = chunk_address(y, step_bytes, slot, feature / 8);
    reinterpret_cast<__nv_bfloat16*>(chunk)[feature % 8] = __float2bfloat16_rn(value);
  }

  __device__ void write_zeros(int slot, int slots, int from) const {
    const int chunks = k_steps(inter) * 8 - from / 8;
    for (int i = threadIdx.x % 128; i < slots * chunks; i += 128) {
      *reinterpret_cast<uint4*>(chunk_address(y, step_bytes, slot + i / chunks, from / 8 + i % chunks)) = uint4{};
    }
  }
};

// Tokens of slots in use to tiled rows, a warp a slot. hidden: [tokens, stride] bf16, rows aligned to 16 bytes.
struct Gather {
  const u8* hidden;
  i64 stride_bytes;
  const i32* slot_token;  // [slots] token of each slot, -1 for padding
  i32 slots;
  i32 columns;  // hidden size
  u8* tokens;   // tiled
  i64 step_bytes;
};

static __global__ void gather(const __grid_constant__ Gather args) {
  const int slot = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (slot >= args.slots || args.slot_token[slot] < 0) return;
  const u8* row = args.hidden + args.slot_token[slot] * args.stride_bytes;
  for (int chunk = threadIdx.x % 32; chunk < k_steps(args.columns) * 8; chunk += 32) {
    uint4 value{};
    if (chunk * 8 < args.columns) value = reinterpret_cast<const uint4*>(row)[chunk];
    *reinterpret_cast<uint4*>(chunk_address(args.tokens, args.step_bytes, slot, chunk)) = value;
  }
}

}  // namespace fourmoe::sm90
