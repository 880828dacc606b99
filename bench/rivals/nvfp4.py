"""Random NVFP4 weights on a GPU, and a Triton kernel that expands those of the experts hit into bf16."""
import dataclasses

import torch
import triton
import triton.language as tl


@triton.jit
def e2m1(code):
    """Value of a code (its low four bits) as f32: exponent and mantissa in place, then the bias made good."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e4m3(byte):
    return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def expand_groups(codes, scales, globals_, experts, out, groups_an_expert, BLOCK: tl.constexpr):
    """out[expert, group, 16] of BLOCK groups of one of `experts`."""
    expert = tl.load(experts + tl.program_id(1))
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = group < groups_an_expert
    group = expert.to(tl.int64) * groups_an_expert + group
    scale = e4m3(tl.load(scales + group, mask=inside, other=0)) * tl.load(globals_ + expert)
    byte = tl.load(codes + group[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    value = tl.reshape(tl.join(e2m1(byte), e2m1(byte >> 4)), (BLOCK, 16)) * scale[:, None]
    tl.store(out + group[:, None] * 16 + tl.arange(0, 16)[None, :], value.to(tl.bfloat16), mask=inside[:, None])


@dataclasses.dataclass
class Weights:
    """One projection of all experts, outputs x inputs."""
    codes: torch.Tensor    # u8 [experts, outputs, inputs / 2], the first of two weights in the low bits
    scales: torch.Tensor   # bytes of e4m3 [experts, outputs, inputs / 16], not negative
    globals_: torch.Tensor  # f32 [experts]
    bf16: torch.Tensor     # [experts, outputs, inputs]: the same weights

    @classmethod
    def random(cls, experts, outputs, inputs):
        codes = torch.randint(0, 256, (experts, outputs, inputs // 2), device="cuda", dtype=torch.uint8)
        # Exponents 4 to 7: of one magnitude, as trained weights are.
        scales = torch.randint(0x20, 0x40, (experts, outputs, inputs // 16), device="cuda", dtype=torch.uint8)
        weights = cls(codes, scales, torch.full((experts,), 2.0**-4, device="cuda"),
                      torch.empty(experts, outputs, inputs, device="cuda", dtype=torch.bfloat16))
        weights.expand(torch.arange(experts, device="cuda", dtype=torch.int32))
        return weights

    def expand(self, experts):
        """Writes `bf16` of these experts (i32)."""
        groups, block = self.scales[0].numel(), 256
        expand_groups[(triton.cdiv(groups, block), len(experts))](
            self.codes, self.scales, self.globals_, experts, self.bf16, groups, BLOCK=block)
