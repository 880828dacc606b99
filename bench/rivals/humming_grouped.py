"""Humming (package humming-kernels): W4A16 on NVFP4 weights, the tiles its own heuristics choose for each token count,
in its two forms: rows grouped by expert, and rows found through an index."""
import itertools
import json

import torch
from humming import dtypes, ops
from humming._version import __version__
from humming.config import ComputeConfig, GemmType
from humming.config.enum import WeightScale2Type, WeightScaleType
from humming.kernel.humming import HummingKernel
from humming.schema import HummingWeightSchema
from humming.transform import prepare_and_transform_humming_tensors, prepare_layer_config
from humming.tune import get_heuristics_config

from call import Call

VERSION = __version__
PADDED = 128  # outputs of a projection: fewer than its smallest tile it refuses


def schema_of_nvfp4():
    return HummingWeightSchema(b_dtype=dtypes.float4e2m1, bs_dtype=dtypes.float8e4m3, weight_scale_group_size=16,
                               weight_scale_type=WeightScaleType.GROUP, weight_scale_2_type=WeightScale2Type.TENSOR)


def tile_config(layer, compute, rows):
    return get_heuristics_config(layer, shape_m=rows, gemm_type=compute.gemm_type)


class Projection:
    """One projection of all experts in Humming's layout."""

    def __init__(self, weights, form):
        experts, self.outputs, inputs = weights.bf16.shape
        tensors = {"weight": weights.codes.view(torch.int32), "weight_scale": weights.scales.view(torch.float8_e4m3fn),
                   "weight_scale_2": weights.globals_}
        self.layer, self.tensors = prepare_and_transform_humming_tensors(
            tensors, shape_n=self.outputs, shape_k=inputs, weight_schema=schema_of_nvfp4(), num_experts=experts,
            torch_dtype=torch.bfloat16, pad_n_to_multiple=PADDED)
        self.compute = ComputeConfig(gemm_type=form)
        self.locks = torch.zeros(2048, dtype=torch.int32, device="cuda")

    def bind(self, routing, x):
        config = tile_config(self.layer, self.compute, routing.rows)
        kernel = HummingKernel.prepare_kernels(self.layer.to_str(), self.compute.to_str(), config)
        places = self.places(routing, config["block_shape"][0])
        out = torch.empty(routing.rows, self.outputs, device="cuda", dtype=torch.bfloat16)

        def run():
            ops.launch_kernel(configs=kernel, inputs=x, outputs=out, locks=self.locks, top_k=1, **places, **self.tensors)
            return out
        return run

    def places(self, routing, block):
        if self.compute.gemm_type == GemmType.GROUPED_CONTIGUOUS:
            return {"expert_layout": torch.tensor(routing.begin, device="cuda", dtype=torch.int64)}
        ids, experts = [], []
        for expert, count in enumerate(routing.counts):
            blocks = -(-count // block)
            ids += range(routing.begin[expert], routing.begin[expert] + count)
            ids += [routing.rows] * (blocks * block - count)
            experts += [expert] * blocks
        ids, experts, count = (torch.tensor(v, device="cuda", dtype=torch.int32) for v in (ids, experts, len(ids)))
        return {"sorted_ids": ids, "expert_ids": experts, "num_tokens_padded": count}


class Grouped:
    form = GemmType.GROUPED_CONTIGUOUS

    def __init__(self, shape, first, second):
        self.first, self.second = Projection(first, self.form), Projection(second, self.form)

    def bind(self, routing, x, y):
        return Call(self.first.bind(routing, x), self.second.bind(routing, y))


class Indexed(Grouped):
    form = GemmType.INDEXED


def compile_all(shapes, tokens):
    """Compiles what the shapes need at these token counts, side by side, into Humming's cache."""
    specs = {}
    for form, shape in itertools.product((GemmType.GROUPED_CONTIGUOUS, GemmType.INDEXED), shapes):
        for outputs, inputs in ((shape.rows1, shape.hidden), (shape.hidden, shape.inter)):
            layer = prepare_layer_config(outputs, inputs, schema_of_nvfp4(), num_experts=shape.experts,
                                         torch_dtype=torch.bfloat16, pad_n_to_multiple=PADDED)
            compute = ComputeConfig(gemm_type=form)
            for count in tokens:
                config = tile_config(layer, compute, count * shape.top_k)
                parts = HummingKernel._resolve_configs(layer.to_str(), compute.to_str(), config)
                spec = parts[0] | parts[1] | parts[2]
                spec.pop("num_sms", None)
                specs[json.dumps(spec, sort_keys=True, default=str)] = (HummingKernel, spec)
    print(f"humming: {len(specs)} kernels", flush=True)
    HummingKernel.compile_many(specs.values())
