#!/usr/bin/env python3
"""What a call of a layer costs the host beyond the layer's own work, in microseconds of CPU time.

Measured in turns within one run: an empty torch operator (through torch.library, as ours is), `layer(...)` with torch
tensors on no tokens (everything but the computation), the same with `out` and a workspace, the operator
torch.ops.fourmoe.run, and for scale a call on one token with its computation in the smallest layer at hand.

Where there is a GPU that the build computes on: calls on no tokens and on eight there, the same eight through the C ABI
(libfourmoe.so of FOURMOE_BUILD, by ctypes with everything converted beforehand), and what a captured call takes the GPU
in a graph of calls of `layer(...)` and of the C ABI, in turns.
Usage: python_overhead.py [--output record.json] [--check]
"""
import argparse
import ctypes
import json
import os
import pathlib
import platform
import statistics
import sys
import time

import torch

import fourmoe
import fourmoe.torch  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny-moe" / "nvfp4"
BAR = 15.0  # microseconds of a call beyond the layer's work
CAPTURED_BAR = 2.0  # microseconds of a captured call beyond one captured through the C ABI


def cpu_time(function, calls):
    """Microseconds of this process's CPU time a call. What it enqueued before has ended: a full queue would wait."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.process_time_ns()
    for _ in range(calls):
        function()
    return (time.process_time_ns() - start) / calls / 1e3


def measure(cases, turns=41, calls=200):
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


def c_call(x, ids, weights, out, workspace):
    """The same call through the C ABI, as a function without arguments: on torch's current stream at each call."""
    sys.path.insert(0, str(ROOT / "tests" / "python"))
    import library
    library.BUILD = pathlib.Path(os.environ.get("FOURMOE_BUILD", ROOT / "build-cuda"))
    layers = library.Library(TINY, library.W4A16, b"sm90", b"cuda:0")

    def view(tensor, dtype):
        return library.Tensor(tensor.data_ptr(), dtype, 0, *tensor.shape, tensor.stride(0))

    call = library.Call(struct_size=ctypes.sizeof(library.Call), hidden_states=view(x, library.BF16),
                        topk_ids=view(ids, library.I32), topk_weights=view(weights, library.F32),
                        output=view(out, library.BF16))
    run, layer, call_at = layers.c.fourmoe_layer_run, layers.layers[0], ctypes.byref(call)
    memory, size = ctypes.c_void_p(-(-workspace.data_ptr() // 64) * 64), ctypes.c_int64(workspace.numel() - 63)

    def function():
        if run(layer, call_at, memory, size) != 0:
            raise RuntimeError(layers.c.fourmoe_last_error().decode())

    def on_current_stream():
        call.stream = torch.cuda.current_stream().cuda_stream
        function()

    return function, on_current_stream, layers


def graph_of(function, calls):
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def measure_captured(cases, turns=41, calls=20, replays=10):
    """name -> (median, p10, p90) microseconds of the GPU's time a call, in graphs of some calls, replayed in turns."""
    graphs = {name: graph_of(function, calls) for name, function in cases.items()}
    times = {name: [] for name in cases}
    for turn in range(turns + 1):  # the first warms up
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            if turn > 0:
                times[name].append(begin.elapsed_time(end) * 1e3 / (replays * calls))
    return {name: (statistics.median(t), sorted(t)[turns // 10], sorted(t)[-turns // 10 - 1]) for name, t in times.items()}


def add_device_cases(cases):
    """The host's part of calls on the first GPU, where there is one that the build computes on, and captured calls."""
    if not torch.cuda.is_available():
        return {}
    try:
        layer = fourmoe.load(TINY, layer=0, device="cuda:0")
    except fourmoe.UnavailableError as error:
        print(f"no case on a GPU: {error}", file=sys.stderr)
        return {}
    x = torch.randn(8, layer.hidden, dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(4, dtype=torch.int32, device="cuda").repeat(8, 1)
    weights, out = torch.full((8, 4), 0.25, device="cuda"), torch.empty_like(x)
    workspace = torch.empty(layer.workspace_bytes(), dtype=torch.uint8, device="cuda")
    eager, captured, held = c_call(x, ids, weights, out, workspace)
    none = x[:0], ids[:0], weights[:0]

    def call():
        layer(x, ids, weights, out=out, workspace=workspace)

    graph = graph_of(call, 1)
    cases["layer(...), no tokens on a GPU"] = lambda: layer(*none)
    cases["layer(...), 8 tokens on a GPU"] = call
    cases["the C ABI, 8 tokens on a GPU"] = eager
    cases["a graph's replay of 8 tokens"] = graph.replay
    return {"layer(...), captured": call, "the C ABI, captured": captured, "held": held}


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
    captured = add_device_cases(cases)
    return layer, library, captured, cases


def failures(table, captured):
    """The bars that do not hold, in words."""
    within = [name for name in ("layer(...)", "layer(...), no tokens on a GPU") if name in table]
    words = [f"{name} takes {table[name][0]:.2f} us, expected up to {BAR}" for name in within if table[name][0] > BAR]
    if "layer(...), 8 tokens on a GPU" in table:
        more = table["layer(...), 8 tokens on a GPU"][0] - table["the C ABI, 8 tokens on a GPU"][0]
        if more > BAR:
            words.append(f"layer(...) takes {more:.2f} us beyond the C ABI's call, expected up to {BAR}")
        more = captured["layer(...), captured"][0] - captured["the C ABI, captured"][0]
        if more > CAPTURED_BAR:
            words.append(f"a captured call takes {more:.2f} us beyond the C ABI's, expected up to {CAPTURED_BAR}")
    return words


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--check", action="store_true", help=f"fail when layer(...) takes over {BAR} us, or a captured "
                        f"call over {CAPTURED_BAR} us more than the C ABI's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layer, _library, captured_cases, cases = make_cases()
    _held = captured_cases.pop("held", None)
    table = measure(cases)
    captured = measure_captured(captured_cases)
    for name, (median, p10, p90) in {**table, **captured}.items():
        print(f"{name:30} {median:7.2f} us   (p10 {p10:.2f}, p90 {p90:.2f})")
    if arguments.output:
        record = {"command": "python3 bench/python_overhead.py", "machine": layer.explain().splitlines()[0].split(None, 1)[1],
                  "python": platform.python_version(), "torch": torch.__version__, "fourmoe": fourmoe.__version__,
                  "unit": "microseconds of CPU time a call, median, p10, p90 of 41 turns of 200 calls",
                  "results": {name: [round(value, 3) for value in values] for name, values in table.items()}}
        if captured:
            record["gpu"] = torch.cuda.get_device_name()
            record["captured"] = {"unit": "microseconds of the GPU's time a call, median, p10, p90 of 41 turns of 10 replays of 20",
                                  **{name: [round(value, 3) for value in values] for name, values in captured.items()}}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    wrong = failures(table, captured)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
