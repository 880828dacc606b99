#!/usr/bin/env python3
"""What a call of a layer costs the host beyond the layer's own work, in microseconds of CPU time.

Measured in turns within one run: an empty torch operator (through torch.library, as ours is), `layer(...)` with torch
tensors on no tokens (everything but the computation), the same with `out` and a workspace, the operator
torch.ops.fourmoe.run, and for scale a call on one token with its computation in the smallest layer at hand.
Usage: python_overhead.py [--output record.json] [--check]
"""
import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

import torch

import fourmoe
import fourmoe.torch  # noqa: F401

TINY = pathlib.Path(__file__).resolve().parents[1] / "examples" / "tiny-moe" / "nvfp4"
BAR = 15.0  # microseconds: issue "Python and PyTorch"


def cpu_time(function, calls):
    """Microseconds of this process's CPU time a call."""
    start = time.process_time_ns()
    for _ in range(calls):
        function()
    return (time.process_time_ns() - start) / calls / 1e3


def measure(cases, turns=41, calls=400):
    """name -> (median, p10, p90) over turns; cases take turns, so that the machine's moods hit all alike."""
    times = {name: [] for name in cases}
    for function in cases.values():
        cpu_time(function, calls)
    for _ in range(turns):
        for name, function in cases.items():
            times[name].append(cpu_time(function, calls))
    return {name: (statistics.median(t), sorted(t)[turns // 10], sorted(t)[-turns // 10 - 1]) for name, t in times.items()}


def empty_operator():
    library = torch.library.Library("fourmoe_overhead", "DEF")
    library.define("nothing(Tensor x) -> Tensor")
    library.impl("nothing", lambda x: x.new_empty(0), "CPU")
    return library, torch.ops.fourmoe_overhead.nothing


def add_device_cases(cases):
    """The host's part of calls on the first GPU, where there is one that the build computes on."""
    if not torch.cuda.is_available():
        return
    try:
        layer = fourmoe.load(TINY, layer=0, device="cuda:0")
    except fourmoe.UnavailableError as error:
        print(f"no case on a GPU: {error}", file=sys.stderr)
        return
    x = torch.randn(8, layer.hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(4, dtype=torch.int32, device="cuda").repeat(8, 1)
    weights, out = torch.full((8, 4), 0.25, device="cuda"), torch.empty_like(x)
    workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    layer(x, ids, weights, out=out, workspace=workspace)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        layer(x, ids, weights, out=out, workspace=workspace)
    cases["layer(...), 8 tokens on a GPU"] = lambda: layer(x, ids, weights, out=out, workspace=workspace)
    cases["the same as a graph's replay"] = graph.replay


def make_cases():
    layer = fourmoe.load(TINY, layer=0, threads=1)
    x = torch.empty(0, layer.hidden, dtype=torch.bfloat16)
    ids, weights = torch.empty(0, layer.top_k, dtype=torch.int32), torch.empty(0, layer.top_k)
    out, workspace = torch.empty_like(x), torch.empty(layer.workspace_bytes(), dtype=torch.uint8)
    library, nothing = empty_operator()
    operator, handle = torch.ops.fourmoe.run, layer.handle
    one = torch.randn(1, layer.hidden).bfloat16()
    one_ids, one_weights = torch.arange(4, dtype=torch.int32)[None], torch.full((1, 4), 0.25)
    one_out = torch.empty_like(one)
    cases = {
        "empty torch operator": lambda: nothing(x),
        "layer(...)": lambda: layer(x, ids, weights),
        "layer(..., out, workspace)": lambda: layer(x, ids, weights, out=out, workspace=workspace),
        "torch.ops.fourmoe.run": lambda: operator(x, handle, ids, weights),
        "layer(...), one token": lambda: layer(one, one_ids, one_weights, out=one_out, workspace=workspace),
    }
    add_device_cases(cases)
    return layer, library, cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help=f"fail when layer(...) takes over {BAR} us")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layer, _library, cases = make_cases()
    table = measure(cases)
    for name, (median, p10, p90) in table.items():
        print(f"{name:30} {median:7.2f} us   (p10 {p10:.2f}, p90 {p90:.2f})")
    if arguments.output:
        record = {"command": "python3 bench/python_overhead.py", "machine": layer.explain().splitlines()[0].split(None, 1)[1],
                  "python": platform.python_version(), "torch": torch.__version__, "fourmoe": fourmoe.__version__,
                  "unit": "microseconds of CPU time a call, median, p10, p90 of 41 turns of 400 calls",
                  "results": {name: [round(value, 3) for value in values] for name, values in table.items()}}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if arguments.check and table["layer(...)"][0] > BAR else 0


if __name__ == "__main__":
    sys.exit(main())
