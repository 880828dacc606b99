"""The package's functions: names, defaults and documentation; the extension `_core` does the work."""
from __future__ import annotations

import os
from typing import Any, Sequence, Union

from fourmoe import _core

Array = Any  # an array of numpy, torch, JAX or cupy, or any other that DLPack or the buffer protocol can lend
Weight = Union[Array, Sequence[Array]]  # one array, or its splits along the expert dimension


def load(path: Union[str, "os.PathLike[str]"], layer: Union[int, None] = None, *, device: Any = "cpu",
         precision: str = "w4a16", max_tokens: int = 1024, plan: str = "auto", threads: int = 0,
         batch_invariant: bool = False, tuning: Union[str, "os.PathLike[str]", None] = None,
         shared: bool = True) -> _core.Layer:
    """Loads one MoE layer of a checkpoint.

    path: a folder with config.json, a .safetensors file beside its config.json, or a .gguf file.
    layer: its index in the model (see `layers`); may be left out where the model has one MoE layer.
    device: "cpu" or "cuda:N"; where the layer computes, and where the arrays of a call must be.
    precision: "w4a16" (activations of 16 bits, weights exact), "w4a4" (activations quantised to NVFP4 too) or, on a CPU,
        "w4a8_int8" (activations quantised to int8 in groups of 32 columns: lossy, 1 to 2 % off, never chosen unasked).
    max_tokens: most tokens of one pass; longer calls are split. It sizes the workspace.
    plan: "auto", or the name of a backend ("cpu", "reference", on a GPU "sm90"), which must then compute everything.
    threads: most threads that compute, 0 to 1024; 0: all. FOURMOE_AFFINITY=cores in the environment keeps each on a core.
    batch_invariant: no bit of a token's output depends on how many others the call has; costs the smallest calls on a
        GPU up to a fifth of their time, and nothing on a CPU, where it holds anyway.
    tuning: on a GPU, the file of choices that `fourmoe tune` measured; None: the one that FOURMOE_TUNING or the user's
        cache has; "": none. What is wrong in it is left out and said in `Layer.notes`.
    shared: compute the always-active experts too, where the layer has some; False: the routed ones alone.

    Raises ArgumentError (a ValueError) for files and arguments that are refused, naming the tensor and what would pass,
    and UnavailableError (a RuntimeError) for what this machine or build lacks.
    """
    return _core.load(locals())


def layers(path: Union[str, "os.PathLike[str]"]) -> list[int]:
    """Indices of the MoE layers of a checkpoint, ascending. Raises ArgumentError for files that are refused."""
    return _core.layers(path)


def pack(*, gate: Union[Weight, None] = None, up: Weight, down: Weight, top_k: int,
         gate_scale: Union[Weight, None] = None, up_scale: Union[Weight, None] = None,
         down_scale: Union[Weight, None] = None, gate_global: Union[Weight, None] = None,
         up_global: Union[Weight, None] = None, down_global: Union[Weight, None] = None,
         gate_bias: Union[Weight, None] = None, up_bias: Union[Weight, None] = None,
         down_bias: Union[Weight, None] = None, input_scale: Union[Weight, None] = None,
         inter_scale: Union[Weight, None] = None, activation: str = "swiglu", alpha: float = 1.702, beta: float = 1.0,
         limit: float = 7.0, experts: Union[int, None] = None, first_expert: int = 0, score: str = "softmax",
         groups: int = 1, groups_kept: Union[int, None] = None, group_best: int = 2, renormalise: bool = True,
         scale: float = 1.0, weight_on_input: bool = False, selection_bias: Union[Array, None] = None,
         router: Union[Array, None] = None, router_bias: Union[Array, None] = None, device: Any = "cpu",
         precision: str = "w4a16", max_tokens: int = 1024, plan: str = "auto", threads: int = 0,
         batch_invariant: bool = False, tuning: Union[str, "os.PathLike[str]", None] = None, stream: Any = None,
         name: str = "packed from tensors") -> _core.Layer:
    """Makes a layer of weights in memory.

    Arrays are in host memory or, for a layer on a GPU, in that GPU's, each array and each split as it likes. Those in
    host memory the layer keeps alive and reads; leave them unchanged. Those in the GPU's are packed where they are and
    not kept: they may be freed or changed afterwards.

    Shapes, with E local experts, hidden size H and intermediate size I; rows may be strided, their elements adjacent.
    Each weight is one array or a list of arrays along the expert dimension: any number of splits of any sizes.

    gate, up: [E, I, H/2] uint8 (pairs of E2M1, even column in the low nibble), or dense [E, I, H] float32, float16,
        bfloat16, or float8_e4m3fn. gate is left out for the activation "relu2" alone.
    down: [E, H, I/2] uint8, or dense [E, H, I].
    *_scale: of uint8 weights: [E, rows, columns/16] float8_e4m3fn or uint8 (NVFP4), or [E, rows, columns/32]
        float8_e8m0fnu or uint8 (MXFP4).
    *_global: [E] float32 multipliers of each expert's values; 1 where left out.
    *_bias: [E, rows] float32, float16 or bfloat16.
    input_scale, inter_scale: [E] or [1] float32 multipliers for "w4a4": tokens and the intermediate are quantised as
        E2M1 * E4M3 * this. 1 where left out.
    top_k: picks of a token, 1 to 32.
    activation: "swiglu", "swiglu_clamped" (alpha, beta, limit: gpt-oss), "geglu_erf", "geglu_tanh", "relu2".
    experts, first_expert: of the whole layer, when these are the local ones [first_expert, first_expert + E).
    score ... selection_bias: how router logits become picks (see `route`); unused when a call brings its picks.
    router, router_bias: [experts, H] float32, float16 or bfloat16 and [experts] float32; then calls need neither picks
        nor logits.
    device, precision, max_tokens, plan, threads, batch_invariant, tuning: as in `load`. name: how `explain` calls the
        layer.
    stream: on a GPU, the stream that fills the arrays in its memory, an integer or a stream object; without it their
        framework's current stream. It is waited for, and is not one that is being captured into a graph.

    Raises ArgumentError naming the argument (of a list, the split), what was expected and what was found.
    """
    return _core.pack(locals())


def refit(layer: _core.Layer, *, gate: Union[Weight, None] = None, up: Weight, down: Weight,
          gate_scale: Union[Weight, None] = None, up_scale: Union[Weight, None] = None,
          down_scale: Union[Weight, None] = None, gate_global: Union[Weight, None] = None,
          up_global: Union[Weight, None] = None, down_global: Union[Weight, None] = None,
          gate_bias: Union[Weight, None] = None, up_bias: Union[Weight, None] = None,
          down_bias: Union[Weight, None] = None, input_scale: Union[Weight, None] = None,
          inter_scale: Union[Weight, None] = None, stream: Any = None) -> None:
    """Replaces a layer's weights in place: packed weights keep their addresses. Also `layer.refit(...)`.

    Arguments as in `pack`; number of experts, shapes and encoding as they were. Waits for calls under way, on a GPU for
    all that its streams hold. A refusal (ArgumentError) leaves the old weights.
    """
    given = locals()
    given.pop("layer")._refit(given)


setattr(_core.Layer, "refit", refit)


def quantize(values: Array, global_scale: Union[Array, float, None] = None) -> tuple[Any, Any, Any]:
    """Quantises [..., R, C] float32, float16 or bfloat16 to NVFP4, bit for bit as NVIDIA ModelOpt does. C % 16 == 0.

    Returns codes [..., R, C/2] uint8, scales [..., R, C/16] uint8 (E4M3) and globals [...] float32, arrays of the same
    framework. global_scale: [...] float32 or a number; without it amax / 2688 of each matrix.
    Raises ArgumentError for NaN or infinite values, naming the place.
    """
    return _core.quantize(values, global_scale)


def decode(codes: Array, scales: Array, global_scale: Union[Array, float, None] = None) -> Any:
    """Values of NVFP4 or MXFP4: [..., R, C] float32 = E2M1(codes) * scales * global_scale.

    codes: [..., R, C/2] uint8. scales: [..., R, C/16] uint8 or float8_e4m3fn, or [..., R, C/32] uint8 or float8_e8m0fnu.
    global_scale: [...] float32 or a number; without it 1. Code times scale is exact; the global rounds once.
    """
    return _core.decode(codes, scales, global_scale)


def route(router_logits: Array, *, top_k: int, score: str = "softmax", groups: int = 1,
          groups_kept: Union[int, None] = None, group_best: int = 2, renormalise: bool = True, scale: float = 1.0,
          selection_bias: Union[Array, None] = None) -> tuple[Any, Any]:
    """Picks of router logits [T, E] float32, float16 or bfloat16: ids [T, top_k] int32 and weights [T, top_k] float32.

    score: "softmax", "sigmoid", "sqrt_softplus" or "none". selection_bias: [E] float32, selects and never weighs.
    groups, groups_kept, group_best: experts are split into equal groups, of which those with the largest sum of their
    best one or two are kept. renormalise: weights are divided by their sum; then multiplied by `scale`.
    Formulas: src/route/route.h. Raises ArgumentError for NaN or +infinity.
    """
    return _core.route(locals())


def split_gate_up(tensor: Array, group: int = 0, up_first: bool = False) -> tuple[Any, Any]:
    """Gate and up of a fused tensor [E, 2R, ...], as two tensors [E, R, ...] (copies).

    The halves alternate in groups of `group` rows, up_first says which one begins; group 0: one half after the other.
    FlashInfer's weights for sm_100 are group=64, up_first=True; gpt-oss's group=1; most checkpoints' group=0.
    """
    return _core.split_gate_up(tensor, group, up_first)


def linear_scales(scales: Array) -> Any:
    """Scales [E, R, C/16] uint8 of a view [32, 4, R/128, 4, C/64, E] of atoms of 128x4 (any strides), as a copy."""
    return _core.linear_scales(scales)
