"""What the tests of the Python package share: skipping where it cannot be tested, and the layer in plain numpy."""
import importlib
import os
import pathlib
import sys

SOURCE = pathlib.Path(os.environ.get("FOURMOE_SOURCE", pathlib.Path(__file__).parents[2]))
TINY = SOURCE / "examples" / "tiny-moe"


def require(*names):
    """Imports the modules, or ends the test as skipped (exit code 77) saying which one is missing."""
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as error:
            print(f"skipped: no module {name} here ({error})", file=sys.stderr)
            sys.exit(77)
    return modules if len(modules) > 1 else modules[0]


np, _, fourmoe = require("numpy", "fourmoe._core", "fourmoe")


def sigmoid(x):
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def swiglu(gate, up):
    return gate * sigmoid(gate) * up


def bf16(values):
    """To the nearest bf16, ties to even, as f64."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def experts(x, ids, weights, gate, up, down, activation=swiglu):
    """The routed experts in f64, tokens and intermediate rounded to bf16 as `w4a16` demands.

    x [T, H], ids and weights [T, k], gate and up [E, I, H], down [E, H, I] -> [T, H]
    """
    out = np.zeros((len(x), down.shape[1]))
    for token, row in enumerate(bf16(x)):
        for pick, weight in zip(ids[token], weights[token]):
            if 0 <= pick < len(up):
                hidden = activation(gate[pick] @ row if gate is not None else None, up[pick] @ row)
                out[token] += weight * (down[pick] @ bf16(hidden))
    return out


def relative_l2(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


class Packed:
    """Random NVFP4 experts: `arguments` for fourmoe.pack, and the same weights decoded."""

    def __init__(self, experts=8, hidden=64, inter=48, top_k=2, seed=0):
        self.random = np.random.default_rng(seed)
        self.experts, self.hidden, self.inter, self.top_k = experts, hidden, inter, top_k
        self.arguments, self.dense = {"top_k": top_k}, {}
        for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
            values = self.random.standard_normal((experts, *shape)).astype(np.float32) / 8
            codes, scales, globals_ = fourmoe.quantize(values)
            globals_ = globals_ * self.random.uniform(0.8, 1.25, experts).astype(np.float32)  # gate and up differ
            self.dense[name] = fourmoe.decode(codes, scales, globals_).astype(np.float64)
            self.arguments |= {name: codes, f"{name}_scale": scales, f"{name}_global": globals_}

    def tokens(self, count):
        x = self.random.standard_normal((count, self.hidden)).astype(np.float32)
        ids = np.stack([self.random.permutation(self.experts)[: self.top_k] for _ in range(count)]).astype(np.int32) \
            if count else np.zeros((0, self.top_k), np.int32)
        weights = self.random.uniform(0.1, 1, (count, self.top_k)).astype(np.float32)
        return x, ids, weights

    def expected(self, x, ids, weights):
        return experts(x, ids, weights, self.dense["gate"], self.dense["up"], self.dense["down"])
