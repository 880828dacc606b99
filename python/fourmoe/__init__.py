"""Mixture-of-Experts layers on 4-bit NVFP4 weights, for arrays of numpy, torch, JAX or cupy.

    layer = fourmoe.load("examples/tiny-moe/nvfp4", layer=0)
    output = layer(hidden_states, topk_ids=ids, topk_weights=weights)

The tutorial is docs/python.md. `fourmoe.torch` has operators for torch.compile, `fourmoe.compat` faces of other
libraries. Nothing of torch or numpy is imported before an array of theirs is given.
"""
from fourmoe._api import decode, layers, linear_scales, load, pack, quantize, refit, route, split_gate_up
from fourmoe._core import ArgumentError, Error, Layer, UnavailableError
from fourmoe._core import version as __version__

__all__ = [
    "ArgumentError", "Error", "Layer", "UnavailableError", "__version__", "decode", "layers", "linear_scales", "load",
    "pack", "quantize", "refit", "route", "split_gate_up",
]
