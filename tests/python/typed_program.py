"""What a user writes: mypy --strict must accept it (typing_test.py), and it must run."""
import sys
from typing import Any

import fourmoe


def describe(layer: fourmoe.Layer) -> str:
    parts: list[str] = [layer.encoding, layer.precision, layer.activation, layer.plan, layer.device, *layer.notes]
    numbers: int = layer.hidden + layer.inter + layer.experts + layer.top_k + layer.workspace_bytes(16)
    return " ".join(parts) + str(numbers + layer.packed_bytes) + str(layer.has_router and not layer.has_shared)


def run(layer: fourmoe.Layer, hidden_states: Any, ids: Any, weights: Any) -> Any:
    try:
        return layer(hidden_states, topk_ids=ids, topk_weights=weights, precision="w4a4", plan="reference")
    except fourmoe.ArgumentError as error:
        reason: str = error.reason
        raise SystemExit(reason) from error


def main(path: str) -> None:
    indices: list[int] = fourmoe.layers(path)
    layer = fourmoe.load(path, layer=indices[0], device="cpu", max_tokens=16, threads=1)
    print(describe(layer), layer.explain(16), fourmoe.__version__)
    codes, scales, globals_ = fourmoe.quantize([[0.0]] if len(sys.argv) > 2 else memoryview(bytes(64)).cast("f", (1, 16)))
    values = fourmoe.decode(codes, scales, globals_)
    splits = [values, values]
    if len(indices) == 0:
        fourmoe.pack(gate=splits, up=splits, down=splits, top_k=1, activation="swiglu").refit(gate=splits, up=splits, down=values)


if __name__ == "__main__":
    main(sys.argv[1])
