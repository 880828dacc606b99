#!/usr/bin/env python3
"""The forward pass of Qwen3-MoE in numpy, in float32, with the experts left to the caller.

    python model.py                               # compares with capture.safetensors, prints bits per byte
    python model.py --prompt "HACKER, n.  One who"    # continues a text

Letters in shapes: T tokens, H hidden 128, A heads 4, G key/value heads 2, D head size 32, E experts 32,
k picks per token 4, I expert intermediate 64, V vocabulary 256 (a token is a byte).
"""
import argparse
import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent


def read_safetensors(path):
    """-> {name: array}, {metadata}. bf16 is widened to float32; f8 (E4M3) comes as its bytes."""
    raw = np.memmap(path, np.uint8, "r")
    begin = 8 + int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8:begin].tobytes())
    dtypes = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32, "F64": np.float64, "U8": np.uint8, "F8_E4M3": np.uint8}
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = raw[begin + start:begin + end].view(dtypes[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values
    return tensors, metadata


def softmax(x):  # over the last axis
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x, cos, sin):
    """Rotary position embedding: x [T, heads, D], cos and sin [T, 1, D/2]; pairs are (i, i + D/2)."""
    low, high = np.split(x, 2, -1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


class Model:
    """A Qwen3-MoE checkpoint folder. `experts(layer, hidden [T, H], ids [T, k], weights [T, k]) -> [T, H]`
    computes the weighted sum of the picked experts; without it the checkpoint's own bf16 experts are used."""

    def __init__(self, folder, experts=None):
        self.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        self.tensors, _ = read_safetensors(pathlib.Path(folder) / "model.safetensors")
        self.experts = experts or self.bf16_experts

    def norm(self, x, name):  # RMS over the last axis
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.config["rms_norm_eps"]))
        return x / scale * self.tensors[f"{name}.weight"]

    def linear(self, x, name):  # x [T, in] -> [T, out]; weights are stored [out, in]
        return x @ self.tensors[f"{name}.weight"].T

    def attention(self, x, layer):  # [T, H] -> [T, H], causal
        name, T, D = f"model.layers.{layer}.self_attn", len(x), self.config["head_dim"]
        frequency = self.config["rope_theta"] ** (-np.arange(0, D, 2) / D)
        angle = (np.arange(T)[:, None, None] * frequency).astype(np.float32)  # [T, 1, D/2]
        cos, sin = np.cos(angle), np.sin(angle)

        q = rotate(self.norm(self.linear(x, f"{name}.q_proj").reshape(T, -1, D), f"{name}.q_norm"), cos, sin)  # [T, A, D]
        k = rotate(self.norm(self.linear(x, f"{name}.k_proj").reshape(T, -1, D), f"{name}.k_norm"), cos, sin)  # [T, G, D]
        v = self.linear(x, f"{name}.v_proj").reshape(T, -1, D)  # [T, G, D]
        k, v = (y.repeat(q.shape[1] // y.shape[1], axis=1).transpose(1, 0, 2) for y in (k, v))  # [A, T, D]

        scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) / np.float32(np.sqrt(D))  # [A, T, T]
        scores += np.triu(np.full((T, T), -np.inf, np.float32), 1)
        mixed = (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, -1)  # [T, A*D]
        return self.linear(mixed, f"{name}.o_proj")

    def route(self, x, layer):
        """x [T, H] -> ids [T, k], largest weight first, and weights [T, k] that sum to 1."""
        probabilities = softmax(self.linear(x, f"model.layers.{layer}.mlp.gate"))  # [T, E]
        ids = np.argsort(-probabilities, -1, kind="stable")[:, :self.config["num_experts_per_tok"]]
        weights = np.take_along_axis(probabilities, ids, -1)
        return ids.astype(np.int32), weights / weights.sum(-1, keepdims=True)

    def bf16_experts(self, layer, hidden, ids, weights):
        output = np.zeros_like(hidden)
        for expert in np.unique(ids):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            token, pick = np.nonzero(ids == expert)
            x = hidden[token]
            x = silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")  # [picked, I]
            output[token] += self.linear(x, f"{name}.down_proj") * weights[token, pick, None]
        return output

    def logits(self, tokens):  # [T] integers -> [T, V]
        x = self.tensors["model.embed_tokens.weight"][tokens]  # [T, H]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            x = x + self.attention(self.norm(x, f"{name}.input_layernorm"), layer)
            hidden = self.norm(x, f"{name}.post_attention_layernorm")
            x = x + self.experts(layer, hidden, *self.route(hidden, layer))
        return self.norm(x, "model.norm") @ self.tensors["model.embed_tokens.weight"].T

    def bits_per_byte(self, windows):
        """windows [n, T] -> mean bits of information in each byte, given the bytes before it in its window."""
        bits = [-np.log2(softmax(self.logits(window[:-1]).astype(np.float64)))[np.arange(len(window) - 1), window[1:]]
                for window in windows]
        return float(np.mean(bits))

    def continued(self, text, length, temperature, seed=0):
        """Yields `length` bytes that go on from `text`. Nothing is cached: each byte is a whole forward pass."""
        tokens, random = list(text), np.random.default_rng(seed)
        for _ in range(length):
            logits = self.logits(np.array(tokens[-self.config["max_position_embeddings"]:]))[-1]
            tokens.append(int(random.choice(len(logits), p=softmax(logits.astype(np.float64) / temperature))))
            yield tokens[-1]


def relative_l2(x, reference):
    return float(np.linalg.norm((x - reference).astype(np.float64)) / np.linalg.norm(reference.astype(np.float64)))


def compare(model, capture, metadata):
    """Prints how far this file's arithmetic is from the captured arithmetic of torch."""
    tokens, rows = capture["tokens"], capture["rows"]
    print(f"logits: rel-L2 {relative_l2(model.logits(tokens[0])[rows], capture['logits']):.1e}")
    for layer in range(model.config["num_hidden_layers"]):
        hidden = capture[f"layer{layer}.hidden_states"]
        output = model.experts(layer, hidden, *model.route(hidden, layer))
        error = relative_l2(output, capture[f"layer{layer}.output"])
        print(f"MoE block of layer {layer}: rel-L2 {error:.1e} (captured as bf16)")
    print(f"bits per byte: {model.bits_per_byte(tokens):.5f}, torch {float(metadata['bits_per_byte.bf16']):.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=HERE / "bf16", help="checkpoint folder")
    parser.add_argument("--capture", type=pathlib.Path, default=HERE / "capture.safetensors")
    parser.add_argument("--prompt", help="text to continue")
    parser.add_argument("--length", type=int, default=400, help="bytes to add")
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()

    model = Model(args.model)
    if args.prompt is None:
        compare(model, *read_safetensors(args.capture))
    else:
        text = bytes(model.continued(args.prompt.encode(), args.length, args.temperature))
        print(args.prompt + text.decode(errors="replace"))


if __name__ == "__main__":
    main()
