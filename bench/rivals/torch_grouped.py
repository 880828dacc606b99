"""torch's grouped GEMM on bf16 weights, alone and after expanding NVFP4 weights."""
import torch

from call import Call


class Grouped:
    def __init__(self, shape, first, second):
        self.projections = first, second

    def gemm(self, weights, x, ends, experts):
        return torch._grouped_mm(x, weights.bf16.transpose(1, 2), offs=ends)

    def bind(self, routing, x, y):
        ends, experts = (torch.tensor(values, device="cuda", dtype=torch.int32)
                         for values in (routing.begin[1:], [e for e, count in enumerate(routing.counts) if count]))
        first, second = self.projections
        return Call(lambda: self.gemm(first, x, ends, experts), lambda: self.gemm(second, y, ends, experts))


class ExpandedGrouped(Grouped):
    def gemm(self, weights, x, ends, experts):
        weights.expand(experts)
        return super().gemm(weights, x, ends, experts)
