"""torch operators over layers: what torch.compile, torch.export and CUDA graphs can see through.

    module = fourmoe.torch.Module(fourmoe.load(path, layer=0))
    compiled = torch.compile(module, fullgraph=True)

`layer(...)` itself takes torch tensors and is quicker in eager code; the operators are for graphs. They are for
inference: no gradient passes through them.
"""
from __future__ import annotations

from typing import Any, Optional

import torch

from fourmoe import _core

_ARGUMENTS = ("Tensor hidden_states, int layer, Tensor? topk_ids=None, Tensor? topk_weights=None, "
              "Tensor? router_logits=None, *, str? precision=None, str? plan=None")

_Library: Any = torch.library.Library  # untyped in torch
_library = _Library("fourmoe", "DEF")
_library.define(f"run({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"run_out({_ARGUMENTS}, Tensor(a!) out, Tensor(b!)? workspace=None) -> ()",
                tags=(torch.Tag.pt2_compliant_tag,))


def _run(hidden_states: torch.Tensor, layer: int, topk_ids: Optional[torch.Tensor] = None,
         topk_weights: Optional[torch.Tensor] = None, router_logits: Optional[torch.Tensor] = None, *,
         precision: Optional[str] = None, plan: Optional[str] = None) -> torch.Tensor:
    output: torch.Tensor = _core.find_layer(layer)(hidden_states, topk_ids, topk_weights, router_logits,
                                                   precision=precision, plan=plan)
    return output


def _run_out(hidden_states: torch.Tensor, layer: int, topk_ids: Optional[torch.Tensor] = None,
             topk_weights: Optional[torch.Tensor] = None, router_logits: Optional[torch.Tensor] = None, *,
             precision: Optional[str] = None, plan: Optional[str] = None, out: torch.Tensor,
             workspace: Optional[torch.Tensor] = None) -> None:
    _core.find_layer(layer)(hidden_states, topk_ids, topk_weights, router_logits, precision=precision, plan=plan,
                            out=out, workspace=workspace)


for _key in ("CPU", "CUDA"):
    _library.impl("run", _run, _key)
    _library.impl("run_out", _run_out, _key)


@torch.library.register_fake("fourmoe::run", lib=_library)
def _(hidden_states, layer, topk_ids=None, topk_weights=None, router_logits=None, *, precision=None, plan=None):  # type: ignore[no-untyped-def]
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


@torch.library.register_fake("fourmoe::run_out", lib=_library)
def _(hidden_states, layer, topk_ids=None, topk_weights=None, router_logits=None, *, precision=None, plan=None, out, workspace=None):  # type: ignore[no-untyped-def]
    return None


class Module(torch.nn.Module):
    """A layer as a torch module; keeps the layer alive for the graphs that name it by its number."""

    def __init__(self, layer: _core.Layer) -> None:
        super().__init__()
        self.layer = layer
        self.handle = layer.handle

    def forward(self, hidden_states: torch.Tensor, topk_ids: Optional[torch.Tensor] = None,
                topk_weights: Optional[torch.Tensor] = None,
                router_logits: Optional[torch.Tensor] = None) -> torch.Tensor:
        """hidden_states [..., hidden] and the others [T, ...] as in `Layer.__call__` -> [..., hidden]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        output: torch.Tensor = torch.ops.fourmoe.run(rows, self.handle, topk_ids, topk_weights, router_logits)
        return output.reshape(hidden_states.shape)

    def extra_repr(self) -> str:
        return repr(self.layer)
