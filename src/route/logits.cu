// Router logits on the tensor cores, in f64.
//
// Products of two f32 are exact in f64, so every step of a sum rounds once, as on the host. The order of a sum depends
// on hidden alone: columns go by chunks of 32, chunk c to slice c % kSlices; slices are added in fours, the fours in
// order. Tiles differ in how many warps and blocks share a logit's slices.
#include <cooperative_groups.h>

#include "gpu/isa/mma.cuh"
#include "gpu/launch.cuh"
#include "gpu/rows.h"
#include "gpu/values.cuh"
#include "route/device.h"

namespace fourmoe::route {
namespace {

namespace cluster = cooperative_groups;

constexpr i32 kThreads = 256;
constexpr i32 kWarps = kThreads / 32;
constexpr i32 kSlices = 32;
constexpr i32 kGroup = 4;  // slices added before others are

// Types of tokens and router, known to the compiler where that matters; any: by the tensors.
struct AnyType {
  static __device__ __forceinline__ format::Dtype of(const format::Tensor& tensor) { return tensor.dtype; }
};
template <format::Dtype kType>
struct OneType {
  static __device__ __forceinline__ format::Dtype of(const format::Tensor&) { return kType; }
};

// 8 * kRows tokens by 8 * kExperts experts of a cluster of kParts blocks, each of which has its part of the slices; a
// warp loads kBatch chunks at once.
template <i32 kRowEights, i32 kExpertEights, i32 kClusterBlocks, i32 kChunks, class TokensOf = AnyType,
          class RouterOf = AnyType>
struct Tile {
  using Tokens = TokensOf;  // types
  using Router = RouterOf;
  template <class T, class R>
  using Of = Tile<kRowEights, kExpertEights, kClusterBlocks, kChunks, T, R>;
  static constexpr i32 kRows = kRowEights;
  static constexpr i32 kExperts = kExpertEights;
  static constexpr i32 kParts = kClusterBlocks;
  static constexpr i32 kBlocks = kRows * kExperts > 4 ? 1 : 2;  // of a multiprocessor: the widest spills with two
  static constexpr i32 kBatch = kChunks;
  static constexpr i32 kOwn = kSlices / kParts / kWarps;  // slices of a warp
  static constexpr i32 kKept = kParts == 1 ? 1 : kOwn;    // sums that a warp leaves: of a group or of a slice
  static constexpr i32 kLogits = 64 * kRows * kExperts;
  static constexpr i32 kBytes = kWarps * kKept * kLogits * 8;  // [kWarps * kKept, kLogits] f64
  using Sums = f64[kRows][kExperts][2];
};

struct Octet {
  uint4 low;
  uint4 high;  // of f32
};

template <class Type>
__device__ __forceinline__ Octet load(const format::Tensor& from, i32 row, i32 octet) {
  Octet out = {{0, 0, 0, 0}, {0, 0, 0, 0}};
  if (octet >= from.cols / 8) return out;
  const bool wide = Type::of(from) == format::Dtype::f32;
  const void* begin =
      static_cast<const u8*>(from.data) + i64{min(row, static_cast<i32>(from.rows) - 1)} * from.stride * (wide ? 4 : 2);
  const uint4* at = static_cast<const uint4*>(begin);
  out.low = at[wide ? 2 * octet : octet];
  if (wide) out.high = at[2 * octet + 1];
  return out;
}

__device__ __forceinline__ void decode(const Octet& octet, format::Dtype dtype, f32 (&x)[8]) {
  const u32 words[8] = {octet.low.x,  octet.low.y,  octet.low.z,  octet.low.w,
                        octet.high.x, octet.high.y, octet.high.z, octet.high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const u32 pair = words[i / 2];
    if (dtype == format::Dtype::f32) x[i] = __uint_as_float(words[i]);
    else if (dtype == format::Dtype::bf16) x[i] = i % 2 == 0 ? gpu::low_bf16(pair) : gpu::high_bf16(pair);
    else x[i] = format::from_f16(static_cast<u16>(pair >> 16 * (i % 2)));
  }
}

// Where a block begins, and the lane's row of eight and its octet of four.
struct At {
  i32 token;
  i32 expert;
  i32 row;
  i32 octet;
};

template <class T>
__device__ __forceinline__ void add_chunk(const DeviceLogits& a, const Octet (&tokens)[T::kRows],
                                          const Octet (&experts)[T::kExperts], typename T::Sums& sums) {
  f32 x[T::kRows][8];
  f32 w[T::kExperts][8];
#pragma unroll
  for (int r = 0; r < T::kRows; ++r) decode(tokens[r], T::Tokens::of(a.hidden), x[r]);
#pragma unroll
  for (int e = 0; e < T::kExperts; ++e) decode(experts[e], T::Router::of(a.router), w[e]);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int r = 0; r < T::kRows; ++r) {
#pragma unroll
      for (int e = 0; e < T::kExperts; ++e) gpu::isa::multiply_add(x[r][i], w[e][i], sums[r][e]);
    }
  }
}

template <class T>
__device__ __forceinline__ void add_slice(const DeviceLogits& a, const At& at, i32 slice, typename T::Sums& sums) {
  const i32 chunks = (a.hidden.cols + 31) / 32;
  for (i32 chunk = slice; chunk < chunks; chunk += T::kBatch * kSlices) {
    Octet tokens[T::kBatch][T::kRows];
    Octet experts[T::kBatch][T::kExperts];
#pragma unroll
    for (int b = 0; b < T::kBatch; ++b) {
      const i32 octet = 4 * (chunk + b * kSlices) + at.octet;
#pragma unroll
      for (int r = 0; r < T::kRows; ++r)
        tokens[b][r] = load<typename T::Tokens>(a.hidden, at.token + 8 * r + at.row, octet);
#pragma unroll
      for (int e = 0; e < T::kExperts; ++e)
        experts[b][e] = load<typename T::Router>(a.router, at.expert + 8 * e + at.row, octet);
    }
#pragma unroll
    for (int b = 0; b < T::kBatch; ++b) {
      if (chunk + b * kSlices < chunks) add_chunk<T>(a, tokens[b], experts[b], sums);
    }
  }
}

// shared: [warps' sums, kLogits], row by row of the tile.
template <class T>
__device__ __forceinline__ void keep(const At& at, i32 index, const typename T::Sums& sums, f64* shared) {
  f64* to = shared + index * T::kLogits;
#pragma unroll
  for (int r = 0; r < T::kRows; ++r) {
#pragma unroll
    for (int e = 0; e < T::kExperts; ++e) {
      f64* pair = to + (8 * r + at.row) * 8 * T::kExperts + 8 * e + 2 * at.octet;
      pair[0] = sums[r][e][0], pair[1] = sums[r][e][1];
    }
  }
}

template <class T>
__device__ __forceinline__ void add_sums(const typename T::Sums& sums, typename T::Sums* total) {
#pragma unroll
  for (int r = 0; r < T::kRows; ++r) {
#pragma unroll
    for (int e = 0; e < T::kExperts; ++e) {
      (*total)[r][e][0] += sums[r][e][0];
      (*total)[r][e][1] += sums[r][e][1];
    }
  }
}

template <class T>
__device__ __forceinline__ void sum_slices(const DeviceLogits& a, const At& at, i32 part, f64* shared) {
  const i32 warp = static_cast<i32>(threadIdx.x / 32);
  typename T::Sums total = {};
#pragma unroll 1
  for (i32 s = 0; s < T::kOwn; ++s) {
    typename T::Sums sums = {};
    add_slice<T>(a, at, (part * kWarps + warp) * T::kOwn + s, sums);
    if constexpr (T::kParts > 1) keep<T>(at, warp * T::kOwn + s, sums, shared);
    else add_sums<T>(sums, &total);
  }
  if constexpr (T::kParts == 1) keep<T>(at, warp, total, shared);
}

// Sum number `index` of all the cluster's.
template <class T>
__device__ __forceinline__ f64 kept_sum(f64* shared, i32 index, i32 logit) {
  constexpr i32 kBlock = kWarps * T::kKept;
  f64* of = shared;
  if (T::kParts > 1) of = cluster::this_cluster().map_shared_rank(shared, index / kBlock);
  return of[index % kBlock * T::kLogits + logit];
}

template <class T>
__device__ __forceinline__ f64 add_groups(f64* shared, i32 logit) {
  constexpr i32 kSums = T::kParts == 1 ? 1 : kGroup;  // kept of a group
  f64 sum = 0.0;
#pragma unroll
  for (i32 g = 0; g < kSlices / kGroup; ++g) {
    f64 group = kept_sum<T>(shared, g * kSums, logit);
#pragma unroll
    for (i32 s = 1; s < kSums; ++s) group += kept_sum<T>(shared, g * kSums + s, logit);
    sum = g == 0 ? group : sum + group;
  }
  return sum;
}

template <class T>
__device__ __forceinline__ void write_logits(const DeviceLogits& a, const At& at, i32 part, f64* shared) {
  for (i32 i = part * kThreads + static_cast<i32>(threadIdx.x); i < T::kLogits; i += T::kParts * kThreads) {
    const i32 token = at.token + i / (8 * T::kExperts);
    const i32 expert = at.expert + i % (8 * T::kExperts);
    if (token >= a.hidden.rows || expert >= a.router.rows) continue;
    const f64 bias = a.bias != nullptr ? f64{a.bias[expert]} : 0.0;
    a.logits[token * a.router.rows + expert] = static_cast<f32>(add_groups<T>(shared, i) + bias);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, T::kBlocks) multiply(const __grid_constant__ DeviceLogits a) {
  extern __shared__ f64 shared[];
  gpu::begin();
  const i32 tile = static_cast<i32>(blockIdx.x) / T::kParts;
  const i32 part = static_cast<i32>(blockIdx.x) % T::kParts;
  const i32 columns = (static_cast<i32>(a.router.rows) + 8 * T::kExperts - 1) / (8 * T::kExperts);
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  const At at = {tile / columns * 8 * T::kRows, tile % columns * 8 * T::kExperts, lane / 4, lane % 4};
  sum_slices<T>(a, at, part, shared);
  if (T::kParts > 1) cluster::this_cluster().sync();
  else __syncthreads();
  write_logits<T>(a, at, part, shared);
  if (T::kParts > 1) cluster::this_cluster().sync();  // others read this block's memory
}

template <class T>
Status launch_tile(const DeviceLogits& args, void* stream) {
  static_assert(T::kBytes <= 48 << 10);
  const i64 rows = (args.hidden.rows + 8 * T::kRows - 1) / (8 * T::kRows);
  const i64 columns = (args.router.rows + 8 * T::kExperts - 1) / (8 * T::kExperts);
  return gpu::launch("logits", multiply<T>, {rows * columns * T::kParts, kThreads, T::kBytes, T::kParts}, args, stream);
}

// Types that checkpoints have get code of their own.
template <class T>
Status launch_typed(const DeviceLogits& args, void* stream) {
  using Bf16 = OneType<format::Dtype::bf16>;
  using F32 = OneType<format::Dtype::f32>;
  const bool bf16 = args.hidden.dtype == format::Dtype::bf16;
  if (bf16 && args.router.dtype == format::Dtype::bf16)
    return launch_tile<typename T::template Of<Bf16, Bf16>>(args, stream);
  if (bf16 && args.router.dtype == format::Dtype::f32)
    return launch_tile<typename T::template Of<Bf16, F32>>(args, stream);
  return launch_tile<T>(args, stream);
}

}  // namespace

Status launch_logits(const DeviceLogits& args, void* stream) {
  const i64 tokens = args.hidden.rows;
  if (tokens == 0) return {};
  Status status = gpu::check_rows("hidden_states", args.hidden);
  if (status.ok()) status = gpu::check_rows("router", args.router);
  if (!status.ok()) return status;
  if (tokens <= 8) return launch_typed<Tile<1, 1, 4, 4>>(args, stream);
  if (tokens <= 16) return launch_typed<Tile<1, 1, 2, 4>>(args, stream);
  if (tokens <= 128) return launch_typed<Tile<2, 2, 2, 2>>(args, stream);
  return launch_typed<Tile<2, 4, 1, 1>>(args, stream);
}

}  // namespace fourmoe::route
