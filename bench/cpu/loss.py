#!/usr/bin/env python3
"""Measures how far the lossy precisions are from w4a16, as rel-L2 of a layer's output, and writes a record.

    PYTHONPATH=build/python python bench/cpu/loss.py --output bench/results/cpu-loss.json

Tokens: what the shipped model's layers see on text (examples/tiny-moe/capture.safetensors), and random ones for the
shape of Qwen3-30B's layer with 16 of its experts: normal, and normal with a column in 256 that is 20 times larger, as the
outlier channels of large models are. Weights there are normal, quantised by `fourmoe.quantize`. w4a4 only where the
checkpoint has its scales.
"""
import argparse
import importlib.util
import json
import pathlib

import fourmoe
import numpy as np

TINY = pathlib.Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
HIDDEN, INTER, EXPERTS, TOP_K, TOKENS = 2048, 768, 16, 8, 64


def relative_l2(found, expected):
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def losses(layer, precisions, hidden, *picks):
    """rel-L2 of each precision against w4a16, over all tokens and of the worst one."""
    exact = layer(hidden, *picks)
    rows = {}
    for precision in precisions:
        found = layer(hidden, *picks, precision=precision)
        rows[precision] = {"rel_l2": relative_l2(found, exact),
                           "worst_token": max(relative_l2(a, b) for a, b in zip(found, exact))}
    return rows


def captured():
    spec = importlib.util.spec_from_file_location("model", TINY / "model.py")
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    tensors, _ = model.read_safetensors(TINY / "capture.safetensors")
    for index in fourmoe.layers(TINY / "nvfp4"):
        layer = fourmoe.load(TINY / "nvfp4", index)
        hidden = tensors[f"layer{index}.hidden_states"].astype(np.float32)
        yield f"tiny-moe layer {index}", losses(layer, ("w4a8_int8", "w4a4"), hidden)


def matrices(random, rows, cols, fan_in):
    """[E, rows, cols] in NVFP4: codes, scales, globals."""
    made = [fourmoe.quantize((random.standard_normal((rows, cols)) / fan_in ** 0.5).astype(np.float32))
            for _ in range(EXPERTS)]
    codes, scales, multipliers = (np.stack([np.asarray(part) for part in parts]) for parts in zip(*made))
    return codes, scales, multipliers.astype(np.float32)


def drawn():
    random = np.random.default_rng(7)
    parts = {}
    for name, rows, cols in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER)):
        parts[name], parts[f"{name}_scale"], parts[f"{name}_global"] = matrices(random, rows, cols, cols)
    layer = fourmoe.pack(**parts, top_k=TOP_K)
    hidden = random.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    ids = np.stack([random.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)]).astype(np.int32)
    weights = random.dirichlet(np.ones(TOP_K), TOKENS).astype(np.float32)
    yield "normal tokens", losses(layer, ("w4a8_int8",), hidden, ids, weights)
    hidden[:, ::256] *= 20.0
    yield "tokens with outliers", losses(layer, ("w4a8_int8",), hidden, ids, weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = [{"tokens": name, **found} for name, found in (*captured(), *drawn())]
    for row in rows:
        print(f"{row['tokens']:22s}", *(f"{name} {loss['rel_l2']:.4f} (worst token {loss['worst_token']:.4f})"
                                        for name, loss in row.items() if name != "tokens"), sep="  ")
    args.output.write_text(json.dumps({"command": "python bench/cpu/loss.py --output FILE", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
