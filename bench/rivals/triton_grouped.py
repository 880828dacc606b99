"""A grouped GEMM in Triton as fused-MoE kernels are usually written: blocks of sorted rows, an expert each, tile sizes
by rows an expert; on bf16 weights and on NVFP4 weights that are expanded in registers."""
import torch
import triton
import triton.language as tl

from call import Call
from clock import median_microseconds
from nvfp4 import e2m1, e4m3

# (rows, outputs, inputs, warps, stages) of a tile, by rows an expert at most.
TILES = {
    16: ((16, 64, 128, 4, 4), (16, 128, 64, 4, 5), (16, 128, 128, 4, 4)),
    32: ((32, 64, 128, 4, 4), (32, 128, 64, 4, 4)),
    64: ((64, 128, 64, 4, 4), (64, 256, 64, 8, 3)),
    1 << 30: ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3)),
}


@triton.jit
def weight_tile(w, scales, expert, outputs, k, N, K, NVFP4: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr):
    """[ROWS, BK] of one expert's weights in bf16, inputs from k on; zero beyond K."""
    line = (expert * N + outputs)[:, None]
    if not NVFP4:
        inputs = k + tl.arange(0, BK)[None, :]
        return tl.load(w + line * K + inputs, mask=inputs < K, other=0.0)
    pair = k // 2 + tl.arange(0, BK // 2)[None, :]
    byte = tl.load(w + line * (K // 2) + pair, mask=pair < K // 2, other=0).to(tl.int32)
    group = k // 16 + tl.arange(0, BK // 16)[None, :]
    scale = e4m3(tl.load(scales + line * (K // 16) + group, mask=group < K // 16, other=0))
    value = tl.reshape(tl.join(e2m1(byte), e2m1(byte >> 4)), (ROWS, BK // 16, 16)) * scale[:, :, None]
    return tl.reshape(value, (ROWS, BK)).to(tl.bfloat16)


@triton.jit(do_not_specialize=["blocks"])
def grouped(x, w, scales, globals_, out, block_expert, block_begin, block_end, blocks, N, K, NVFP4: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    pid, columns = tl.program_id(0), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    height = min(blocks - first, GROUP)
    block = first + pid % (GROUP * columns) % height
    outputs = pid % (GROUP * columns) // height * BN + tl.arange(0, BN)
    expert = tl.load(block_expert + block).to(tl.int64)
    rows = (tl.load(block_begin + block) + tl.arange(0, BM)).to(tl.int64)
    present = rows < tl.load(block_end + block)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inputs = k + tl.arange(0, BK)
        tokens = tl.load(x + rows[:, None] * K + inputs[None, :], mask=present[:, None] & (inputs < K)[None, :], other=0.0)
        total = tl.dot(tokens, tl.trans(weight_tile(w, scales, expert, outputs % N, k, N, K, NVFP4, BN, BK)), total)
    if NVFP4:
        total *= tl.load(globals_ + expert)
    tl.store(out + rows[:, None] * N + outputs[None, :], total.to(tl.bfloat16), mask=present[:, None] & (outputs < N)[None, :])


class Grouped:
    nvfp4 = False

    def __init__(self, shape, first, second):
        self.first, self.second = first, second
        self.chosen = {}  # the best tile by rows

    def launch(self, weights, x, blocks, tile):
        experts, outputs, inputs = weights.bf16.shape
        bm, bn, bk, warps, stages = tile
        out = torch.empty(x.shape[0], outputs, device="cuda", dtype=torch.bfloat16)
        grouped[(blocks.shape[1] * triton.cdiv(outputs, bn),)](
            x, weights.codes if self.nvfp4 else weights.bf16, weights.scales, weights.globals_, out, blocks[0], blocks[1],
            blocks[2], blocks.shape[1], outputs, inputs, NVFP4=self.nvfp4, BM=bm, BN=bn, BK=bk, GROUP=8,
            num_warps=warps, num_stages=stages)
        return out

    def with_tile(self, routing, x, y, tile):
        blocks = [(e, begin, routing.begin[e + 1]) for e in range(len(routing.begin) - 1)
                  for begin in range(routing.begin[e], routing.begin[e + 1], tile[0])]
        blocks = torch.tensor(blocks, device="cuda", dtype=torch.int32).t().contiguous()
        return Call(lambda: self.launch(self.first, x, blocks, tile), lambda: self.launch(self.second, y, blocks, tile))

    def bind(self, routing, x, y):
        mean = routing.rows / routing.active
        tiles = next(tiles for most, tiles in TILES.items() if mean <= most)
        if routing.rows not in self.chosen:
            self.chosen[routing.rows] = min(tiles, key=lambda tile: median_microseconds(
                [self.with_tile(routing, x, y, tile)], warm=5e-3, measured=10e-3))
        return self.with_tile(routing, x, y, self.chosen[routing.rows])


class GroupedNvfp4(Grouped):
    nvfp4 = True
