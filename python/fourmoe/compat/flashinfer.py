"""FlashInfer's NVFP4 MoE functions, computed by fourmoe: the same names, arguments, defaults, shapes and layouts.

    from fourmoe.compat.flashinfer import cute_dsl_fused_moe_nvfp4  # for flashinfer's own

They run where fourmoe runs. What upstream takes for its kernels alone (tactics, streams to overlap with, programmatic
launches, a choice of combine) is accepted and changes nothing: results here are always bitwise reproducible. Upstream at
version 0.6.18 is meant.

Weights are packed at the first call with given tensor objects and again when one of them was changed in place or given
other memory; pass the same objects in each call. Changes that torch does not count, through `.data` or of tensors made
in inference mode, are not seen. Layouts, with L local experts, H hidden, I intermediate:
    w1_weight [L, 2I, H/2] uint8, up and gate rows; w2_weight [L, H, I/2] uint8 (pairs of E2M1, low nibble first)
    w*_weight_sf [32, 4, rows/128, 4, columns/64, L] float8_e4m3fn or uint8: scales in atoms of 128 x 4
"""
from __future__ import annotations

import re
import weakref
from typing import Any, Callable, Optional

import torch

import fourmoe

_LARGEST = torch.finfo(torch.float32).max
_SWIGLU, _RELU2, _GEGLU_TANH = 3, 6, 8  # flashinfer's ActivationType
_NAMES = {"gate_global": "w1_alpha", "up_global": "w1_alpha", "down_global": "w2_alpha", "up_scale": "w1_weight_sf",
          "gate_scale": "w1_weight_sf", "down_scale": "w2_weight_sf", "hidden_scales": "x_sf", "hidden_states": "x",
          "topk_ids": "token_selected_experts", "topk_weights": "token_final_scales", "gate": "w1_weight",
          "up": "w1_weight", "down": "w2_weight"}
_WORDS = re.compile(r"\b(\w+_\w+)\b|^(\w+)\b|(?<=to go with )(\w+)|(?<=memory with )(\w+)|(?<=experts, )(\w+)(?= for )")


def _refusal(words: str, reason: str = "argument_invalid") -> fourmoe.ArgumentError:
    made = fourmoe.ArgumentError(words)
    made.reason = reason
    return made


def _renamed(error: fourmoe.ArgumentError, **names: str) -> fourmoe.ArgumentError:
    """The same refusal with the names that the caller used; names: those that depend on the function."""
    known = {**_NAMES, **names}
    return _refusal(_WORDS.sub(lambda word: known.get(word[0], word[0]), str(error)), error.reason)


class _Cache:
    """Layers by the tensor objects that they were packed from; an entry goes when one of its tensors does."""

    def __init__(self) -> None:
        self.layers: dict[Any, tuple[Any, Any, fourmoe.Layer]] = {}

    def get(self, tensors: list[torch.Tensor], options: tuple[Any, ...], make: Callable[[], fourmoe.Layer]) -> fourmoe.Layer:
        key = (*map(id, tensors), options)
        versions = [(None if tensor.is_inference() else tensor._version, tensor.data_ptr()) for tensor in tensors]
        known = self.layers.get(key)
        if known is not None and known[1] == versions:
            return known[2]
        try:
            layer = make()
        except fourmoe.ArgumentError as error:
            raise _renamed(error) from None
        watches = [weakref.ref(tensor, lambda _, key=key: self.layers.pop(key, None)) for tensor in tensors]  # type: ignore[misc]
        self.layers[key] = (watches, versions, layer)
        return layer


_cache = _Cache()


def _host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _scales(name: str, view: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[L, rows, columns/16] uint8 of a view of atoms, which may be padded."""
    try:
        linear: torch.Tensor = fourmoe.linear_scales(_host(view))
    except fourmoe.ArgumentError as error:
        raise _renamed(error, scales=name) from None
    if linear.shape[1] < rows or linear.shape[2] * 16 < columns:
        raise _refusal(f"{name} is for {linear.shape[1]} rows and {16 * linear.shape[2]} columns, expected {rows} and "
                       f"{columns}")
    return linear[:, :rows, : columns // 16].contiguous()


def _weights(w1: torch.Tensor, w1_sf: torch.Tensor, w2: torch.Tensor, w2_sf: torch.Tensor, group: int,
             gated: bool) -> dict[str, Any]:
    """The weight arguments of fourmoe.pack."""
    w1, w2 = _host(w1).view(torch.uint8).contiguous(), _host(w2).view(torch.uint8)
    given: dict[str, Any] = {"down": w2, "down_scale": _scales("w2_weight_sf", w2_sf, w2.shape[1], 2 * w2.shape[2])}
    scales = _scales("w1_weight_sf", w1_sf, w1.shape[1], 2 * w1.shape[2])
    if gated:
        given["gate"], given["up"] = fourmoe.split_gate_up(w1, group, True)
        given["gate_scale"], given["up_scale"] = fourmoe.split_gate_up(scales, group, True)
    else:
        given["up"], given["up_scale"] = w1, scales
    return given


def _expand(name: str, scale: torch.Tensor, experts: int) -> torch.Tensor:
    """[experts] f32 on the host, of a scalar, [1] or [experts]."""
    if scale.numel() not in (1, experts):
        raise _refusal(f"{name} is {list(scale.shape)}, expected [1] or [{experts}]")
    return _host(scale).float().reshape(-1).expand(experts).contiguous()


def _picks(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Ids that are no expert's are no picks, as upstream has it."""
    return torch.where((ids < 0) | (ids >= experts), -1, ids)


def _call(output: str, layer: fourmoe.Layer, *arguments: Any, **options: Any) -> None:
    """A call whose `out` is called `output` by its caller."""
    try:
        layer(*arguments, **options)
    except fourmoe.ArgumentError as error:
        raise _renamed(error, out=output) from None


def _gated_activation(kind: int, alpha: float, beta: float, limit: float) -> dict[str, Any]:
    """The activation arguments of fourmoe.pack for flashinfer's ActivationType."""
    if kind == _RELU2:
        return {"activation": "relu2"}
    if kind == _GEGLU_TANH:
        return {"activation": "geglu_tanh"}
    if kind != _SWIGLU:
        raise ValueError(f"Unsupported activation_type {kind!r}; expected {_SWIGLU} (Swiglu), {_GEGLU_TANH} (GegluTanh) "
                         f"or {_RELU2} (Relu2)")
    if (alpha, beta) == (1.0, 0.0) and limit >= _LARGEST:
        return {"activation": "swiglu"}
    return {"activation": "swiglu_clamped", "alpha": alpha, "beta": beta, "limit": min(limit, _LARGEST)}


def cute_dsl_fused_moe_nvfp4(
        x: torch.Tensor, x_sf: Optional[torch.Tensor], token_selected_experts: torch.Tensor,
        token_final_scales: torch.Tensor, w1_weight: torch.Tensor, w1_weight_sf: torch.Tensor, w1_alpha: torch.Tensor,
        fc2_input_scale: Optional[torch.Tensor], w2_weight: torch.Tensor, w2_weight_sf: torch.Tensor,
        w2_alpha: torch.Tensor, num_experts: int, top_k: int, num_local_experts: Optional[int] = None,
        local_expert_offset: int = 0, output_dtype: torch.dtype = torch.bfloat16, use_fused_finalize: bool = True,
        moe_output: Optional[torch.Tensor] = None, aux_stream: Any = None, enable_pdl: bool = True,
        activation_type: int = _SWIGLU, swiglu_alpha: float = 1.0, swiglu_beta: float = 0.0,
        swiglu_limit: float = _LARGEST, situ_beta: Optional[float] = None, situ_linear_beta: Optional[float] = None, *,
        quant_mode: str = "w4a4", per_token_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
    """A routed MoE layer; up and gate rows of w1_weight alternate in groups of 64, up first.

    quant_mode "w4a4" (also "nvfp4"): x [T, H/2] uint8 with x_sf [T, H/16] or [T, H/16, 1] float8_e4m3fn; the
    intermediate is quantised with fc2_input_scale [1], a multiplier, whose inverse w2_alpha [L] carries. "w4a16": x
    [T, H] bfloat16, and x_sf, fc2_input_scale, per_token_scale must be None.
    token_selected_experts [T, top_k] int32 of all num_experts, token_final_scales [T, top_k] float32. Returns [T, H]
    output_dtype: moe_output where given, whose first T rows are overwritten.
    """
    if situ_beta is not None or situ_linear_beta is not None:
        raise NotImplementedError("situ_beta: SiTU is not computed; None would pass")
    if per_token_scale is not None and quant_mode.lower() != "w4a16":
        raise NotImplementedError("per_token_scale: scales of whole tokens are not applied; None would pass")
    mode = quant_mode.lower()
    if mode not in ("nvfp4", "w4a4", "w4a16"):
        raise ValueError(f"quant_mode must be 'nvfp4'/'w4a4' or 'w4a16' (got {quant_mode!r}).")
    exact = mode == "w4a16"
    if exact and (x_sf is not None or fc2_input_scale is not None or per_token_scale is not None):
        raise ValueError("x_sf, fc2_input_scale, and per_token_scale must be None when quant_mode='w4a16'")
    if not exact and (x_sf is None or fc2_input_scale is None):
        raise ValueError("x_sf and fc2_input_scale are needed when quant_mode='w4a4'")
    activation = _gated_activation(int(activation_type), swiglu_alpha, swiglu_beta, swiglu_limit)
    local = w1_weight.shape[0]
    if local != (num_local_experts or num_experts):
        raise ValueError(f"w1_weight is for {local} experts, expected {num_local_experts or num_experts}")
    tensors = [w1_weight, w1_weight_sf, w1_alpha, w2_weight, w2_weight_sf, w2_alpha]
    if fc2_input_scale is not None:
        tensors.append(fc2_input_scale)

    def make() -> fourmoe.Layer:
        given = _weights(w1_weight, w1_weight_sf, w2_weight, w2_weight_sf, 64, activation["activation"] != "relu2")
        alpha1, alpha2 = _expand("w1_alpha", w1_alpha, local), _expand("w2_alpha", w2_alpha, local)
        if fc2_input_scale is not None:  # values = code * scale / multiplier
            multiplier = _expand("fc2_input_scale", fc2_input_scale, local)
            given["inter_scale"], alpha2 = 1.0 / multiplier, alpha2 * multiplier
        if "gate" in given:
            given["gate_global"] = alpha1
        return fourmoe.pack(**given, **activation, up_global=alpha1, down_global=alpha2, top_k=top_k,
                            experts=num_experts, first_expert=local_expert_offset, device=str(x.device),
                            precision="w4a16" if exact else "w4a4", name="cute_dsl_fused_moe_nvfp4")

    options = (mode, num_experts, top_k, local_expert_offset, str(x.device), *activation.values())
    layer = _cache.get(tensors, options, make)
    tokens = token_selected_experts.shape[0]
    if moe_output is None:
        moe_output = torch.empty((tokens, w2_weight.shape[1]), dtype=output_dtype, device=x.device)
    codes = x if exact else x.view(torch.uint8)
    scales = None
    if x_sf is not None:
        blocks = codes.shape[-1] // 8  # of 16 values, two in a byte
        if x_sf.numel() != codes.shape[0] * blocks:
            raise _refusal(f"x_sf is {list(x_sf.shape)}, expected [{codes.shape[0]}, {blocks}]")
        scales = x_sf.reshape(codes.shape[0], blocks)
    _call("moe_output", layer, codes, _picks(token_selected_experts, num_experts), token_final_scales,
          hidden_scales=scales, out=moe_output)
    return moe_output[:tokens]


class CuteDslMoEWrapper:
    """`cute_dsl_fused_moe_nvfp4` with its choices made once."""

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int,
                 use_cuda_graph: bool = False, max_num_tokens: Optional[int] = None,
                 num_local_experts: Optional[int] = None, local_expert_offset: int = 0, tile_size: int = 128,
                 sf_vec_size: int = 16, output_dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
                 enable_pdl: bool = True, activation_type: int = _SWIGLU, swiglu_alpha: float = 1.0,
                 swiglu_beta: float = 0.0, swiglu_limit: float = _LARGEST, situ_beta: Optional[float] = None,
                 situ_linear_beta: Optional[float] = None, use_fused_finalize: bool = True,
                 quant_mode: str = "w4a4") -> None:
        """Arguments as upstream; device is that of the tensors of each call. sf_vec_size must be 16."""
        if sf_vec_size != 16:
            raise ValueError(f"sf_vec_size is {sf_vec_size}, expected 16")
        if quant_mode.lower() not in ("nvfp4", "w4a4", "w4a16"):
            raise ValueError(f"quant_mode must be 'nvfp4'/'w4a4' or 'w4a16' (got {quant_mode!r}).")
        _gated_activation(int(activation_type), swiglu_alpha, swiglu_beta, swiglu_limit)
        self.num_experts, self.top_k = num_experts, top_k
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_local_experts = num_local_experts or num_experts
        self.local_expert_offset = local_expert_offset
        self.output_dtype, self.device, self.quant_mode = output_dtype, device, quant_mode.lower()
        self.options = {"activation_type": activation_type, "swiglu_alpha": swiglu_alpha, "swiglu_beta": swiglu_beta,
                        "swiglu_limit": swiglu_limit, "situ_beta": situ_beta, "situ_linear_beta": situ_linear_beta}

    def run(self, x: torch.Tensor, x_sf: Optional[torch.Tensor], token_selected_experts: torch.Tensor,
            token_final_scales: torch.Tensor, w1_weight: torch.Tensor, w1_weight_sf: torch.Tensor,
            w1_alpha: torch.Tensor, fc2_input_scale: Optional[torch.Tensor], w2_weight: torch.Tensor,
            w2_weight_sf: torch.Tensor, w2_alpha: torch.Tensor, tactic: Any = None, *,
            per_token_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
        """As `cute_dsl_fused_moe_nvfp4`; a tactic changes nothing."""
        options: dict[str, Any] = self.options
        return cute_dsl_fused_moe_nvfp4(
            x, x_sf, token_selected_experts, token_final_scales, w1_weight, w1_weight_sf, w1_alpha, fc2_input_scale,
            w2_weight, w2_weight_sf, w2_alpha, self.num_experts, self.top_k, self.num_local_experts,
            self.local_expert_offset, self.output_dtype, quant_mode=self.quant_mode, per_token_scale=per_token_scale,
            **options)

    def get_valid_tactics(self) -> list[Any]:
        """None: fourmoe chooses its steps itself (Layer.explain)."""
        return []


def _b12x_mode(quant_mode: Optional[str], activation_precision: str) -> str:
    """"w4a4" or "w4a16"."""
    word = str(activation_precision if quant_mode is None else quant_mode).lower()
    if word == "mxfp4":
        raise NotImplementedError("quant_mode='mxfp4': activations are not quantised to MXFP4; 'nvfp4' or 'w4a16' would pass")
    if word in ("fp4", "nvfp4", "w4a4"):
        return "w4a4"
    if word in ("bf16", "w4a16"):
        return "w4a16"
    raise ValueError(f"quant_mode must be 'nvfp4'/'w4a4', 'mxfp4', or 'w4a16' (got {word!r}).")


def _b12x_activation(word: str, alpha: float, beta: float, limit: Optional[float]) -> dict[str, Any]:
    known: dict[str, dict[str, Any]] = {
        "silu": {"activation": "swiglu"}, "gelu_tanh": {"activation": "geglu_tanh"}, "relu2": {"activation": "relu2"},
        "swigluoai_uninterleave": {"activation": "swiglu_clamped", "alpha": alpha, "beta": beta,
                                   "limit": _LARGEST if limit is None else limit}}
    if word not in known:
        raise ValueError(f"activation is {word!r}, expected one of {', '.join(known)}")
    return known[word]


def b12x_fused_moe(
        x: torch.Tensor, w1_weight: torch.Tensor, w1_weight_sf: torch.Tensor, w2_weight: torch.Tensor,
        w2_weight_sf: torch.Tensor, token_selected_experts: torch.Tensor, token_final_scales: torch.Tensor,
        num_experts: int, top_k: int, *, w1_alpha: torch.Tensor, w2_alpha: torch.Tensor,
        fc2_input_scale: Optional[torch.Tensor] = None, input_global_scale: Optional[torch.Tensor] = None,
        num_local_experts: Optional[int] = None, output: Optional[torch.Tensor] = None,
        output_dtype: torch.dtype = torch.bfloat16, activation: str = "silu", swiglu_alpha: float = 1.702,
        swiglu_beta: float = 1.0, swiglu_limit: Optional[float] = None, activation_precision: str = "fp4",
        quant_mode: Optional[str] = None, source_format: str = "modelopt") -> torch.Tensor:
    """A routed MoE layer on x [T, H] bfloat16; w1_weight has the rows of up, then those of gate.

    "nvfp4" quantises x with input_global_scale, a scalar or [E] (w1_alpha then is the weights' own scale); without it
    w1_alpha serves both, as upstream. fc2_input_scale quantises the intermediate; w2_alpha contains it. All three are
    scales of values (value = code * block scale * scale). "w4a16" quantises nothing, and w1_alpha, w2_alpha are the
    weights' scales (their inverses where source_format is "compressed_tensors").
    Returns [T, H] bfloat16: `output` where given, overwritten.
    """
    if output_dtype != torch.bfloat16:
        raise ValueError(f"b12x fused MoE only supports output_dtype=torch.bfloat16, got {output_dtype}.")
    if output is not None and output.dtype != torch.bfloat16:
        raise ValueError(f"b12x fused MoE only supports bf16 output buffers, got output.dtype={output.dtype}.")
    mode = _b12x_mode(quant_mode, activation_precision)
    inverse = source_format.lower() in ("compressed_tensors", "compressed-tensors", "ct")
    if inverse and mode != "w4a16":
        raise ValueError("source_format='compressed_tensors' requires quant_mode='w4a16'.")
    if not inverse and source_format.lower() != "modelopt":
        raise ValueError(f"source_format is {source_format!r}, expected 'modelopt' or 'compressed_tensors'")
    if mode == "w4a4" and fc2_input_scale is None:
        raise ValueError("fc2_input_scale is required when quant_mode='nvfp4'.")
    if (num_local_experts or num_experts) != num_experts or w1_weight.shape[0] != num_experts:
        raise NotImplementedError(f"num_local_experts: the first of several ranks cannot be told from the others here; "
                                  f"all {num_experts} experts, or cute_dsl_fused_moe_nvfp4, would pass")
    chosen = _b12x_activation(activation, swiglu_alpha, swiglu_beta, swiglu_limit)
    tensors = [w1_weight, w1_weight_sf, w1_alpha, w2_weight, w2_weight_sf, w2_alpha]
    if mode == "w4a4":
        tensors += [scale for scale in (fc2_input_scale, input_global_scale) if scale is not None]

    def make() -> fourmoe.Layer:
        given = _weights(w1_weight, w1_weight_sf, w2_weight, w2_weight_sf, 0, chosen["activation"] != "relu2")
        alpha1, alpha2 = _expand("w1_alpha", w1_alpha, num_experts), _expand("w2_alpha", w2_alpha, num_experts)
        if inverse:
            alpha1, alpha2 = 1.0 / alpha1, 1.0 / alpha2
        if mode == "w4a4":
            assert fc2_input_scale is not None
            own = input_global_scale is not None
            given["input_scale"] = alpha1 if input_global_scale is None else \
                _expand("input_global_scale", input_global_scale, num_experts)
            given["inter_scale"] = _expand("fc2_input_scale", fc2_input_scale, num_experts)
            alpha1 = alpha1 if own else torch.ones(num_experts)
            alpha2 = alpha2 / given["inter_scale"]
        if "gate" in given:
            given["gate_global"] = alpha1
        return fourmoe.pack(**given, **chosen, up_global=alpha1, down_global=alpha2, top_k=top_k, device=str(x.device),
                            precision=mode, name="b12x_fused_moe")

    options = (mode, inverse, input_global_scale is not None, top_k, str(x.device), *chosen.values())
    layer = _cache.get(tensors, options, make)
    tokens = token_selected_experts.shape[0]
    if output is None:
        output = torch.empty((tokens, x.shape[1]), dtype=output_dtype, device=x.device)
    _call("output", layer, x, _picks(token_selected_experts, num_experts), token_final_scales, out=output)
    return output


class B12xMoEWrapper:
    """`b12x_fused_moe` with its choices made once."""

    def __init__(self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int, *,
                 use_cuda_graph: bool = False, max_num_tokens: int = 4096, num_local_experts: Optional[int] = None,
                 output_dtype: torch.dtype = torch.bfloat16, device: str = "cuda", activation: str = "silu",
                 swiglu_alpha: float = 1.702, swiglu_beta: float = 1.0, swiglu_limit: Optional[float] = None,
                 activation_precision: str = "fp4", quant_mode: Optional[str] = None,
                 source_format: str = "modelopt") -> None:
        """Arguments as upstream. With use_cuda_graph an output of max_num_tokens rows on `device` is kept and lent."""
        if output_dtype != torch.bfloat16:
            raise ValueError(f"b12x fused MoE only supports output_dtype=torch.bfloat16, got {output_dtype}.")
        self.num_experts, self.top_k = num_experts, top_k
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.use_cuda_graph, self.max_num_tokens = use_cuda_graph, max_num_tokens
        self.num_local_experts = num_local_experts or num_experts
        self.quant_mode = _b12x_mode(quant_mode, activation_precision)
        self.options = {"activation": activation, "swiglu_alpha": swiglu_alpha, "swiglu_beta": swiglu_beta,
                        "swiglu_limit": swiglu_limit, "source_format": source_format}
        _b12x_activation(activation, swiglu_alpha, swiglu_beta, swiglu_limit)
        self._output = torch.empty((max_num_tokens, hidden_size), dtype=output_dtype, device=device) \
            if use_cuda_graph else None

    def run(self, x: torch.Tensor, w1_weight: torch.Tensor, w1_weight_sf: torch.Tensor, w2_weight: torch.Tensor,
            w2_weight_sf: torch.Tensor, token_selected_experts: torch.Tensor, token_final_scales: torch.Tensor, *,
            w1_alpha: torch.Tensor, w2_alpha: torch.Tensor, fc2_input_scale: Optional[torch.Tensor] = None,
            input_global_scale: Optional[torch.Tensor] = None) -> torch.Tensor:
        """As `b12x_fused_moe`."""
        tokens = token_selected_experts.shape[0]
        if self._output is not None and tokens > self.max_num_tokens:
            raise ValueError(f"num_tokens ({tokens}) exceeds max_num_tokens ({self.max_num_tokens})")
        options: dict[str, Any] = self.options
        return b12x_fused_moe(
            x, w1_weight, w1_weight_sf, w2_weight, w2_weight_sf, token_selected_experts, token_final_scales,
            self.num_experts, self.top_k, w1_alpha=w1_alpha, w2_alpha=w2_alpha, fc2_input_scale=fc2_input_scale,
            input_global_scale=input_global_scale, num_local_experts=self.num_local_experts,
            output=None if self._output is None else self._output[:tokens], quant_mode=self.quant_mode, **options)
