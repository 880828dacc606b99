#!/usr/bin/env python3
"""Records what the tiny model computes on held-out text, as references for other implementations. Runs on a CPU.

    python capture.py --text text --out capture.safetensors

Arithmetic is float32 on the stored weights. Three versions of the experts:
  bf16   the bf16 weights
  w4a16  the NVFP4 weights, dequantised by ModelOpt
  w4a4   the same, and both inputs of an expert (of gate and up, and of down) quantised by ModelOpt with input_scale

Tensors (n windows of T bytes; R captured rows; H hidden, E experts, V vocabulary):
  tokens                  [n, T] i32   held-out bytes
  rows                    [R] i32      the positions of window 0 that the tensors below are for
  layerL.hidden_states    [R, H] bf16  input of the MoE block of layer L
  layerL.router_logits    [R, E] f32   router on hidden_states as stored (rounded to bf16)
  layerL.output           [R, H] bf16  MoE block on hidden_states as stored, bf16 experts
  layerL.output_w4a16     [R, H] bf16  likewise
  layerL.output_w4a4      [R, H] bf16  likewise
  logits                  [R, V] f32   of the whole model with bf16 experts
Metadata: bits_per_byte.VERSION over the n windows, heldout_bits_per_byte.VERSION over all held-out text.
"""
import argparse
import copy
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen3MoeForCausalLM

from experts import unfuse

BLOCK = 16


def quantised(x, scale):
    """x [.., K] f32 -> rounded to NVFP4 under the global scale `scale`, as f32."""
    tensor, block_scale, _ = NVFP4QTensor.quantize(x, BLOCK, None, scale)
    return tensor.dequantize(dtype=x.dtype, scale=block_scale, double_scale=scale, block_sizes={-1: BLOCK})


def nvfp4_experts(model, checkpoint, quantise_inputs):
    """A copy of `model` whose expert weights are those of an NVFP4 checkpoint."""
    model = copy.deepcopy(model)
    for name, linear in model.named_modules():
        if f"{name}.weight_scale_2" not in checkpoint:
            continue
        weight, scale, scale_2, input_scale = (
            checkpoint[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2", "input_scale"))
        packed = NVFP4QTensor(linear.weight.shape, torch.float32, weight)
        linear.weight = nn.Parameter(
            packed.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: BLOCK}), requires_grad=False)
        if quantise_inputs:
            linear.register_forward_pre_hook(lambda _, inputs, s=input_scale: (quantised(inputs[0], s),))
    return model


def bits_per_byte(model, windows):
    """windows [n, T] i64 -> mean bits per predicted byte; each window starts without context."""
    nats = [F.cross_entropy(model(part[:, :-1], use_cache=False).logits.flatten(0, 1), part[:, 1:].flatten()) * len(part)
            for part in windows.split(16)]
    return (sum(nats) / len(windows) / math.log(2)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default="bf16", help="bf16 checkpoint folder")
    parser.add_argument("--nvfp4", type=pathlib.Path, default="nvfp4", help="NVFP4 checkpoint folder")
    parser.add_argument("--text", type=pathlib.Path, default="text", help="folder with heldout.bin")
    parser.add_argument("--windows", type=int, default=8, help="windows to store, evenly spread over the text")
    parser.add_argument("--rows", type=int, default=24, help="rows to store, evenly spread over window 0")
    parser.add_argument("--out", type=pathlib.Path, default="capture.safetensors")
    args = parser.parse_args()

    torch.set_grad_enabled(False)
    bf16 = unfuse(Qwen3MoeForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval())
    checkpoint = load_file(args.nvfp4 / "model.safetensors")
    versions = {"bf16": bf16, "w4a16": nvfp4_experts(bf16, checkpoint, False), "w4a4": nvfp4_experts(bf16, checkpoint, True)}

    context = bf16.config.max_position_embeddings
    text = np.fromfile(args.text / "heldout.bin", np.uint8)
    heldout = torch.from_numpy(text[: len(text) // context * context].reshape(-1, context)).long()
    tokens = heldout[torch.linspace(0, len(heldout) - 1, args.windows).long()]
    rows = (torch.arange(1, args.rows + 1) * context // args.rows) - 1

    hidden = {}  # layer -> [1, R, H] bf16
    hooks = [layer.mlp.register_forward_pre_hook(
        lambda _, inputs, i=index: hidden.update({i: inputs[0][:, rows].bfloat16()}))
        for index, layer in enumerate(bf16.model.layers)]
    logits = bf16(tokens[:1], use_cache=False).logits[0, rows]
    for hook in hooks:
        hook.remove()

    tensors = {"tokens": tokens.int(), "rows": rows.int(), "logits": logits}
    for index, x in hidden.items():
        tensors[f"layer{index}.hidden_states"] = x[0]
        tensors[f"layer{index}.router_logits"] = bf16.model.layers[index].mlp.gate(x[0].float())[0]
        for version, model in versions.items():
            name = f"layer{index}.output" if version == "bf16" else f"layer{index}.output_{version}"
            tensors[name] = model.model.layers[index].mlp(x.float())[0].bfloat16()

    metadata = {}
    for version, model in versions.items():
        metadata[f"bits_per_byte.{version}"] = f"{bits_per_byte(model, tokens):.6f}"
        metadata[f"heldout_bits_per_byte.{version}"] = f"{bits_per_byte(model, heldout):.6f}"
        print(version, metadata[f"bits_per_byte.{version}"], metadata[f"heldout_bits_per_byte.{version}"], flush=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.out, metadata)
    args.out.chmod(0o644)


if __name__ == "__main__":
    main()
