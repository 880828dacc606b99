#!/usr/bin/env python3
"""Quantises the experts of the tiny model to NVFP4 with NVIDIA ModelOpt and exports the checkpoint. Runs on a CPU.

    python export.py --model bf16 --text text --out nvfp4

The recipe is ModelOpt's `NVFP4_EXPERTS_ONLY_CFG`. Its option `moe_calib_experts_ratio`, set to the
model's own k/E, leaves routing as it is and keeps the input amax of each expert apart instead of
sharing the largest among the experts of a layer.
"""
import argparse
import copy
import json
import pathlib

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import Qwen3MoeForCausalLM

from experts import unfuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default="bf16", help="checkpoint folder to quantise")
    parser.add_argument("--text", type=pathlib.Path, default="text", help="folder with train.bin, to calibrate on")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows, evenly spread over the text")
    parser.add_argument("--out", type=pathlib.Path, default="nvfp4", help="checkpoint folder to write")
    args = parser.parse_args()

    model = Qwen3MoeForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    config, context = model.config, model.config.max_position_embeddings
    unfuse(model)

    text = np.fromfile(args.text / "train.bin", np.uint8)
    starts = np.linspace(0, len(text) - context, args.windows).astype(int)
    windows = torch.from_numpy(np.stack([text[start:start + context] for start in starts])).long()

    def calibrate(model):
        for window in windows.split(8):
            model(window, use_cache=False)

    recipe = copy.deepcopy(mtq.NVFP4_EXPERTS_ONLY_CFG)
    recipe["algorithm"] = {"method": "max", "moe_calib_experts_ratio": config.num_experts_per_tok / config.num_experts}
    with torch.no_grad():
        mtq.quantize(model, recipe, calibrate)
        for index, layer in enumerate(model.model.layers):
            count = layer.mlp.expert_token_count
            print(f"layer {index}: calibration picks per expert {count.min()} to {count.max()}, never hit {(count == 0).sum()}")
        export_hf_checkpoint(model, export_dir=args.out)

    # Readers of hub checkpoints look for these two under their older names.
    path = args.out / "config.json"
    exported = json.loads(path.read_text())
    exported["num_experts"], exported["rope_theta"] = config.num_experts, config.rope_parameters["rope_theta"]
    path.write_text(json.dumps(exported, indent=2, sort_keys=True) + "\n")
    (args.out / "generation_config.json").unlink(missing_ok=True)
    (args.out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
