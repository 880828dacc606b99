// The packer of the Hopper room on the device: bit for bit what tiles.cc packs on the host.
#include "backends/sm90/atom.h"
#include "backends/sm90/tiles.h"

namespace fourmoe::sm90 {
namespace {

constexpr int kPackThreads = 128;  // one for each 16 bytes of a tile's codes

// A row of the blob: a row of gate, of up, or zeros.
struct Source {
  const u8* codes = nullptr;
  const u8* scales = nullptr;

  __device__ u32 scale_byte(int block) const { return codes == nullptr ? 0u : scales[block]; }
};

__device__ Source source_of(const weights::Piece& piece, int row) {
  const bool gated = piece.gate.codes != nullptr;
  const int feature = gated ? row / 16 * 8 + row % 8 : row;
  if (feature >= piece.rows) return {};
  const weights::Rows& rows = gated && row % 16 < 8 ? piece.gate : piece.up;
  return {rows.codes + feature * rows.codes_stride, rows.scales + feature * rows.scales_stride};
}

// E4M3 magnitude to UE5M3, as format::to_ue5m3: the exponent's bias grows by 8.
__device__ u32 to_ue5m3(u32 e4m3) { return __float_as_uint(__uint_as_float((e4m3 & 0x7fu) << 20) * 0x1p8f) >> 20; }

// Two codes of a source, in place; zeros beyond the columns and in blocks whose scale is 0.
__device__ u32 placed(const Source& source, int column, int columns) {
  if (column >= columns || source.scale_byte(column / format::kNvfp4Block) == 0) return 0;
  return place_codes(source.codes[column / 2]);
}

__device__ u32 scale_of(const Source& source, int column, int columns) {
  return column < columns ? to_ue5m3(source.scale_byte(column / format::kNvfp4Block)) : 0;
}

// A block packs one tile: a thread its 16 bytes of codes, the first 64 a word of scales each. The layout is tiles.cc's.
__global__ void __launch_bounds__(kPackThreads) pack_tiles(const __grid_constant__ weights::Piece piece) {
  const int pair = threadIdx.x / 4;  // rows g and g + 8 of a warp's sixteen
  const int top = blockIdx.y * kTileRows + pair / 8 * 16 + pair % 8;
  const int column = blockIdx.x * kTileColumns;
  const Source rows[2] = {source_of(piece, top), source_of(piece, top + 8)};
  u8* tile = reinterpret_cast<u8*>(piece.out) + (i64{blockIdx.y} * gridDim.x + blockIdx.x) * kTileBytes;

  u32 words[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 a[8];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const int first = column + 32 * half + r / 4 * 16 + r % 4 / 2 * 8 + 2 * (threadIdx.x % 4);
      a[r] = placed(rows[r % 2], first, piece.cols);
    }
    merge_codes(a, &words[2 * half], &words[2 * half + 1]);
  }
  reinterpret_cast<uint4*>(tile)[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);

  if (threadIdx.x % 4 >= 2) return;
  const int half = threadIdx.x % 4;
  const int k = column + 32 * half;
  const u32 word = join_scales(scale_of(rows[0], k, piece.cols), scale_of(rows[1], k, piece.cols),
                               scale_of(rows[0], k + 16, piece.cols), scale_of(rows[1], k + 16, piece.cols));
  reinterpret_cast<u32*>(tile + kCodeBytes)[2 * pair + half] = word;
}

}  // namespace

Status pack(const weights::Piece& piece, gpu::Stream stream) {
  const int rows = piece.gate.codes == nullptr ? piece.rows : 2 * piece.rows;
  const dim3 grid(k_steps(piece.cols), row_tiles(rows));
  pack_tiles<<<grid, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(piece);
  return gpu::check_launch("sm90 pack");
}

}  // namespace fourmoe::sm90
