// The packer of the Hopper room on the device: bit for bit what tiles.cc packs on the host.
#include "backends/sm90/atom.h"
#include "backends/sm90/tiles.h"
#include "gpu/launch.cuh"

namespace fourmoe::sm90 {
namespace {

constexpr int kPackThreads = 128;  // one for each 16 bytes of a tile's codes

using format::Encoding;

// A row of the blob: a row of gate, of up, or zeros.
struct Source {
  const u8* values = nullptr;
  const u8* scales = nullptr;
  i32 window = 0;
  i32 columns = 0;  // 0 for zeros

  __device__ bool has(int column) const { return column < columns; }
};

__device__ Source source_of(const weights::Piece& piece, int row) {
  const bool gated = piece.gate.values != nullptr;
  const int feature = feature_of(gated, row);
  if (feature >= piece.rows) return {};
  const weights::Rows& rows = gated && row % 16 < 8 ? piece.gate : piece.up;
  return {rows.values + feature * rows.values_stride, rows.scales + feature * rows.scales_stride, rows.window,
          piece.cols};
}

// E4M3 magnitude to UE5M3, as format::to_ue5m3: the exponent's bias grows by 8.
__device__ u32 to_ue5m3(u32 e4m3) { return __float_as_uint(__uint_as_float((e4m3 & 0x7fu) << 20) * 0x1p8f) >> 20; }

// Two codes of a source, in place; zeros beyond the columns and in blocks whose NVFP4 scale is 0.
template <Encoding kEncoding>
__device__ u32 placed(const Source& source, int column) {
  if (!source.has(column)) return 0;
  if (kEncoding == Encoding::nvfp4 && source.scales[column / format::kNvfp4Block] == 0) return 0;
  return place_codes(source.values[column / 2]);
}

template <Encoding kEncoding>
__device__ u32 scale_of(const Source& source, int column) {
  if (!source.has(column)) return 0;
  const u8 byte = source.scales[column / format::block_of(kEncoding)];
  return kEncoding == Encoding::mxfp4 ? weights::to_power(byte, source.window) : to_ue5m3(byte);
}

// Two dense values, of any alignment.
__device__ u32 value_pair(const Source& source, int column) {
  if (!source.has(column)) return 0;
  const u8* at = source.values + 2 * column;
  return at[0] | at[1] << 8 | at[2] << 16 | u32{at[3]} << 24;
}

__device__ u8* tile_of(const weights::Piece& piece, int bytes) {
  return reinterpret_cast<u8*>(piece.out) + (i64{blockIdx.y} * gridDim.x + blockIdx.x) * bytes;
}

// A block packs one tile: a thread its 16 bytes of codes, the first 64 a word of scales each. The layout is tiles.cc's.
template <Encoding kEncoding>
__global__ void __launch_bounds__(kPackThreads) pack_tiles(const __grid_constant__ weights::Piece piece) {
  const int pair = threadIdx.x / 4;  // rows g and g + 8 of a warp's sixteen
  const int top = blockIdx.y * kTileRows + pair / 8 * 16 + pair % 8;
  const int column = blockIdx.x * kTileColumns;
  const Source rows[2] = {source_of(piece, top), source_of(piece, top + 8)};
  u8* tile = tile_of(piece, kTileBytes);

  u32 words[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 a[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int first = column + 32 * half + r / 4 * 16 + r % 4 / 2 * 8 + 2 * (threadIdx.x % 4);
      a[r] = placed<kEncoding>(rows[r % 2], first);
    }
    merge_codes(a, &words[2 * half], &words[2 * half + 1]);
  }
  reinterpret_cast<uint4*>(tile)[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);

  if (threadIdx.x % 4 >= 2) return;
  const int half = threadIdx.x % 4;
  const int k = column + 32 * half;
  const u32 g0 = scale_of<kEncoding>(rows[0], k), h0 = scale_of<kEncoding>(rows[1], k);
  const u32 g1 = scale_of<kEncoding>(rows[0], k + 16), h1 = scale_of<kEncoding>(rows[1], k + 16);
  const u32 word = kEncoding == Encoding::mxfp4 ? join_powers(g0, h0, g1, h1) : join_scales(g0, h0, g1, h1);
  reinterpret_cast<u32*>(tile + kCodeBytes)[2 * pair + half] = word;
}

// The same for dense weights: a thread its 16 bytes of each K step.
__global__ void __launch_bounds__(kPackThreads) pack_dense_tiles(const __grid_constant__ weights::Piece piece) {
  const int lane = threadIdx.x % 32;
  const int top = blockIdx.y * kTileRows + threadIdx.x / 32 * 16 + lane / 4;
  const Source g = source_of(piece, top), h = source_of(piece, top + 8);
  uint4* tile = reinterpret_cast<uint4*>(tile_of(piece, kDenseTileBytes));
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int first = blockIdx.x * kTileColumns + 16 * step + lane % 4 * 2;
    tile[kPackThreads * step + threadIdx.x] =
        make_uint4(value_pair(g, first), value_pair(h, first), value_pair(g, first + 8), value_pair(h, first + 8));
  }
}

}  // namespace

Status pack(const weights::Piece& piece, gpu::Stream stream) {
  const int rows = piece.gate.values == nullptr ? piece.rows : 2 * piece.rows;
  const dim3 grid(k_steps(piece.cols), row_tiles(rows));
  const auto kernel = piece.encoding == Encoding::nvfp4   ? pack_tiles<Encoding::nvfp4>
                      : piece.encoding == Encoding::mxfp4 ? pack_tiles<Encoding::mxfp4>
                                                          : pack_dense_tiles;
  return gpu::launch_after("sm90 pack", kernel, grid, kPackThreads, stream, piece);
}

}  // namespace fourmoe::sm90
