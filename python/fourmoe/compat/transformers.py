"""transformers 5: fourmoe as an implementation of the experts.

    import fourmoe.compat.transformers  # registers the names below
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="fourmoe")

"fourmoe" computes with exact weights and activations of 16 bits (w4a16), "fourmoe_w4a4" quantises activations to NVFP4
too, "fourmoe_w4a8_int8" to int8 (on a CPU). Experts may be those of an NVFP4 checkpoint of ModelOpt, which transformers itself does not read, or of an MXFP4
checkpoint of gpt-oss; both stay in 4 bits. Or the model's own parameters (bf16, f16 or f32), read where they lie.
Inference only.
"""
from __future__ import annotations

import json
import pathlib
import re
from typing import Any, Optional

import torch
from safetensors import safe_open
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import fourmoe
import fourmoe.torch  # noqa: F401  (registers the operators)

IMPLEMENTATIONS = {"fourmoe": "w4a16", "fourmoe_w4a4": "w4a4", "fourmoe_w4a8_int8": "w4a8_int8"}
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu_erf", "gelu_pytorch_tanh": "geglu_tanh"}


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module is one whose computation transformers lets implementations replace."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "has_bias"))


def _activation(module: Any) -> dict[str, Any]:
    """The activation arguments of fourmoe.pack for an experts module."""
    name = getattr(module.config, "hidden_act", None) or getattr(module.config, "hidden_activation", None)
    if not module.has_gate:
        if name == "relu2":
            return {"activation": "relu2"}
    elif type(module)._apply_gate is not _default_apply_gate:
        if hasattr(module, "alpha") and hasattr(module, "limit"):  # gpt-oss: (up + 1) * gate * sigmoid(alpha * gate)
            return {"activation": "swiglu_clamped", "alpha": float(module.alpha), "beta": 1.0,
                    "limit": float(module.limit)}
    elif name in _GATED:
        return {"activation": _GATED[name]}
    raise fourmoe.UnavailableError(f"{type(module).__name__}: activation {name!r} of these experts is not known")


def _rows(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """[E, outputs, inputs], elements of a row adjacent: the parameter itself, or a copy where it is transposed."""
    return weight.transpose(1, 2).contiguous() if module.is_transposed else weight


def _halves(module: Any, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of [E, 2I, ...], as views."""
    if not module.is_concatenated:
        return fused[:, ::2], fused[:, 1::2]
    middle = fused.shape[1] // 2
    return fused[:, :middle], fused[:, middle:]


def pack_experts(module: Any, top_k: int, **options: Any) -> fourmoe.Layer:
    """A layer of an experts module's own parameters; `options` go to fourmoe.pack. Parameters are read in place where
    their rows are contiguous; see `forget` for what to do after changing them."""
    if getattr(module, "has_post_expert_norm", False):
        raise fourmoe.UnavailableError(f"{type(module).__name__}: a norm after each expert is not computed")
    weights: dict[str, Any] = {"down": _rows(module, module.down_proj)}
    if module.has_gate:
        weights["gate"], weights["up"] = _halves(module, _rows(module, module.gate_up_proj))
    else:
        weights["up"] = _rows(module, module.up_proj)
    if module.has_bias:
        weights["down_bias"] = module.down_proj_bias
        if module.has_gate:
            gate, up = _halves(module, module.gate_up_proj_bias)
            weights["gate_bias"], weights["up_bias"] = gate.contiguous(), up.contiguous()
        else:
            weights["up_bias"] = module.up_proj_bias
    weights = {name: tensor.detach().cpu() for name, tensor in weights.items()}  # no copy where they are there
    return fourmoe.pack(**weights, **_activation(module), top_k=top_k, device=str(module.down_proj.device),
                        name=type(module).__name__, **options)


def layer_of(module: Any, precision: str, top_k: int, device: torch.device) -> fourmoe.Layer:
    """The layer behind an experts module on a device, made at its first use."""
    layers = module.__dict__.setdefault("_fourmoe_layers", {})
    if (precision, device) not in layers:
        source = module.__dict__.get("_fourmoe_source")
        layer = (fourmoe.load(**source, precision=precision, device=str(device)) if source is not None
                 else pack_experts(module, top_k, precision=precision))
        layers[precision, device] = layer
        module.__dict__.setdefault("_fourmoe_handles", {})[precision, device] = layer.handle
    made: fourmoe.Layer = layers[precision, device]
    return made


def prepare(model: Any) -> None:
    """Makes all layers of a model now, not at their first use; torch.compile(fullgraph=True) needs that."""
    for module in model.modules():
        if is_experts(module):
            config: Any = module.config
            layer_of(module, IMPLEMENTATIONS[config._experts_implementation], config.num_experts_per_tok, model.device)


def forget(model: torch.nn.Module) -> None:
    """Drops all layers of a model; the next call makes them anew, from parameters that were changed since."""
    for module in model.modules():
        module.__dict__.pop("_fourmoe_layers", None)
        module.__dict__.pop("_fourmoe_handles", None)


def _forward(precision: str) -> Any:
    def experts_forward(self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor,
                        top_k_weights: torch.Tensor) -> torch.Tensor:
        device = hidden_states.device
        handle = self.__dict__.get("_fourmoe_handles", {}).get((precision, device))  # a number, for torch.compile
        if handle is None:
            handle = layer_of(self, precision, top_k_index.shape[-1], device).handle
        output: torch.Tensor = torch.ops.fourmoe.run(hidden_states, handle, top_k_index, top_k_weights)
        return output

    return experts_forward


for _name, _precision in IMPLEMENTATIONS.items():
    ALL_EXPERTS_FUNCTIONS.register(_name, _forward(_precision))


class ModelOptConfig(QuantizationConfigMixin):
    """The quantization_config of a ModelOpt checkpoint, kept as it is."""

    def __init__(self, quant_method: str = "modelopt", quant_algo: Optional[str] = None, **rest: Any) -> None:
        self.quant_method: Any = quant_method
        self.quant_algo = quant_algo
        self.__dict__.update(rest)


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor -> file that holds it, of a checkpoint's safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: folder / "model.safetensors" for name in file.keys()}


def _read(files: dict[str, pathlib.Path], name: str) -> torch.Tensor:
    with safe_open(files[name], "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


class ExpertsQuantizer(HfQuantizer):
    """Loads the experts of a checkpoint into fourmoe layers, where they stay in 4 bits.

    Other linear layers in NVFP4 are decoded to the model's dtype; the rest is loaded as transformers does.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, dtype: Any = None,
                                             **options: Any) -> None:
        folder = pathlib.Path(checkpoint_files[0]).parent
        self.files = _files(folder)
        self.linears = []  # quantised ones outside the experts: decoded after loading
        held = set(fourmoe.layers(folder))
        for name, module in model.named_modules():
            number = re.search(r"\.layers\.(\d+)\.", name + ".")
            if is_experts(module) and number is not None and int(number[1]) in held:
                self._take_experts(module, folder, int(number[1]))
            elif f"{name}.weight_scale_2" in self.files:
                self.linears.append((name, module))
                self._empty(module, ["weight"])
        scales = r"\.(input_scale|weight_scale|weight_scale_2|k_scale|v_scale)$"
        weights = [rf"^{re.escape(name)}\.weight$" for name, _ in self.linears]
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), r"\.experts\.", scales, *weights}
        model._keys_to_ignore_on_load_unexpected = ignored
        self.dtype = dtype

    def _take_experts(self, module: Any, folder: pathlib.Path, layer: int) -> None:
        if module.config._experts_implementation not in IMPLEMENTATIONS:
            raise ValueError(f"experts_implementation is {module.config._experts_implementation!r}, but {folder} has "
                             f"experts in 4 bits: expected one of {', '.join(IMPLEMENTATIONS)}")
        self._empty(module, list(module._parameters))
        module.__dict__["_fourmoe_source"] = {"path": folder, "layer": layer, "shared": False}

    def _empty(self, module: Any, parameters: list[str]) -> None:
        for parameter in parameters:
            module.register_parameter(parameter, None)
        module._is_hf_initialized = True  # there is nothing to initialise

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        for name, module in self.linears:
            weight, scale, scale_2 = (_read(self.files, f"{name}.{part}")
                                      for part in ("weight", "weight_scale", "weight_scale_2"))
            values = fourmoe.decode(weight, scale, scale_2.float()).to(self.dtype or model.dtype)
            module.weight = torch.nn.Parameter(values.to(model.device), requires_grad=False)
        prepare(model)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        return [c for c in weight_conversions if not any(".experts" in s for s in c._original_source_patterns)]

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class ModelOptQuantizer(ExpertsQuantizer):
    """Of NVFP4 checkpoints that ModelOpt wrote."""

    def validate_environment(self, *arguments: Any, **options: Any) -> None:
        config: Any = self.quantization_config
        if "NVFP4" not in str(config.quant_algo):
            raise ValueError(f"quant_algo is {config.quant_algo!r}, expected 'NVFP4'")


class Mxfp4Quantizer(Mxfp4HfQuantizer):
    """transformers' own for gpt-oss, which becomes ours for a model whose experts_implementation is."""

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **options: Any) -> None:
        if model.config._experts_implementation not in IMPLEMENTATIONS:
            super()._process_model_before_weight_loading(model, *arguments, **options)
            return
        self.__class__ = ExpertsQuantizer  # type: ignore[assignment]
        ExpertsQuantizer._process_model_before_weight_loading(self, model, *arguments, **options)  # type: ignore[arg-type]


if "modelopt" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("modelopt")(ModelOptConfig)
    register_quantizer("modelopt")(ModelOptQuantizer)
    AUTO_QUANTIZER_MAPPING["mxfp4"] = Mxfp4Quantizer
