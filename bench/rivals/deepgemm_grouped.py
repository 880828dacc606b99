"""DeepGEMM's grouped GEMMs on Hopper: bf16, and FP8 with scales for 128 x 128 weights and 128 activations. Its layout
wants each expert's rows to begin at a multiple of its tile; how rows get there is not timed, nor is their quantisation."""
import deep_gemm
import torch

from call import Call

VERSION = deep_gemm.__version__
BLOCK, MOST = 128, 448.0  # of a scale; of e4m3


def spread(routing, x, tile):
    """Rows of x with each expert's at a multiple of `tile`; the end of each expert's; where each row went."""
    begins, ends, at = [], [], 0
    for count in routing.counts:
        begins.append(at)
        ends.append(at + count)
        at += -(-count // tile) * tile
    places = torch.cat([torch.arange(b, e, device="cuda") for b, e in zip(begins, ends)])
    padded = torch.zeros(at, x.shape[1], device="cuda", dtype=x.dtype)
    padded[places] = x
    return padded, torch.tensor(ends, device="cuda", dtype=torch.int32), places


class Bf16:
    def __init__(self, shape, first, second):
        self.projections = [self.weights(weights.bf16) for weights in (first, second)]

    def weights(self, w):
        return w

    def tokens(self, x):
        return x

    def gemm(self, x, w, out, ends, expected):
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, out, ends, use_psum_layout=True, ensure_zero_padding=False,
                                                    expected_m_for_psum_layout=expected)

    def bind(self, routing, x, y):
        tile, expected = (64 if routing.rows <= 64 * routing.active else 128), max(1, routing.rows // routing.active)

        def projection(w, x, outputs):
            padded, ends, places = spread(routing, x, tile)
            tokens, out = self.tokens(padded), torch.empty(len(padded), outputs, device="cuda", dtype=torch.bfloat16)

            def run():
                deep_gemm.set_mk_alignment_for_contiguous_layout(tile)
                self.gemm(tokens, w, out, ends, expected)
                return out
            return run, places
        (first, places), (second, _) = (projection(w, rows, outputs_of(w)) for w, rows in zip(self.projections, (x, y)))
        return Call(first, second, places)


def outputs_of(w):
    return (w[0] if isinstance(w, tuple) else w).shape[1]


class Fp8(Bf16):
    def weights(self, w):
        experts, outputs, inputs = w.shape
        if outputs % BLOCK or inputs % BLOCK:
            raise ValueError(f"its scales are for {BLOCK} x {BLOCK} weights, a projection has {outputs} x {inputs}")
        values = torch.empty(w.shape, device="cuda", dtype=torch.float8_e4m3fn)
        scales = torch.empty(experts, outputs // BLOCK, inputs // BLOCK, device="cuda")
        for expert in range(experts):
            tiles = w[expert].float().view(outputs // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
            scales[expert] = tiles.abs().amax(dim=(1, 3)) / MOST
            values[expert] = (tiles / scales[expert][:, None, :, None]).view(outputs, inputs).to(values.dtype)
        return values, scales

    def tokens(self, x):
        groups = x.view(len(x), -1, BLOCK).float()
        scales = groups.abs().amax(dim=2).clamp(1e-4) / MOST
        values = (groups / scales[:, :, None]).view(x.shape).to(torch.float8_e4m3fn)
        return values, deep_gemm.get_mn_major_tma_aligned_tensor(scales)

    def gemm(self, x, w, out, ends, expected):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(x, w, out, ends, use_psum_layout=True, ensure_zero_padding=False,
                                                   expected_m_for_psum_layout=expected)
