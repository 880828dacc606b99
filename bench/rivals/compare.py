#!/usr/bin/env python3
"""Measures our two GEMMs beside rivals on one Hopper GPU: one run, the same routings, weights and clocks.

    python bench/rivals/compare.py --program build/fourmoe_bench_gemms --command build/fourmoe \
        --output bench/results/sm90-rivals.json

PROGRAM is bench/sm90/gemms.cu, built; with the COMMAND of the build, whole layers of ours (routing from picks, both
GEMMs, activation, combine) stand beside the rivals' GEMMs. Needs a torch with CUDA and Triton; humming-kernels and
deep_gemm are measured where they are installed. A row is both GEMMs of one layer: rows sorted by expert, no activation (ours has it), no
routing, no combine. Every rival's results are compared with torch's before they are timed. With `--rested` the card
rests before each replay. `--warm` only compiles.
"""
import argparse
import gc
import importlib
import json
import pathlib
import subprocess
import sys

import torch

FOLDER = pathlib.Path(__file__).resolve().parent
sys.path += [str(FOLDER), str(FOLDER.parent / "sm90")]
from case import SHAPES, TOKENS, routings  # noqa: E402
from ceilings import run_torch  # noqa: E402
from clock import median_microseconds  # noqa: E402
from nvfp4 import Weights  # noqa: E402

RIVALS = {  # name in the record: module, class
    "torch_bf16": ("torch_grouped", "Grouped"),
    "expand_torch": ("torch_grouped", "ExpandedGrouped"),
    "triton_bf16": ("triton_grouped", "Grouped"),
    "triton_nvfp4": ("triton_grouped", "GroupedNvfp4"),
    "humming_grouped": ("humming_grouped", "Grouped"),
    "humming_indexed": ("humming_grouped", "Indexed"),
    "deepgemm_bf16": ("deepgemm_grouped", "Bf16"),
    "deepgemm_fp8": ("deepgemm_grouped", "Fp8"),
}
# Relative error (Frobenius) against torch on bf16 weights. Both round sums to bf16 (2^-9 at most); FP8 rounds inputs and
# weights to three bits of mantissa: each 2^-4 at most, about 2.6 % together.
BOUNDS = {"deepgemm_fp8": 0.05}
BOUND = 0.005
CHECKED_TOKENS = 1, 64, 1024  # the comparison needs memory and time of its own


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def relative_error(result, reference):
    result, reference = result.float(), reference.float()
    return ((result - reference).norm() / reference.norm()).item()


class Contest:
    """All rivals on the weights of one shape."""

    def __init__(self, shape, names, rested=False):
        self.shape, self.rivals, self.absent, self.rested = shape, {}, {}, rested
        projections = (Weights.random(shape.experts, shape.rows1, shape.hidden),
                       Weights.random(shape.experts, shape.hidden, shape.inter))
        for name in names:
            module, entry = RIVALS[name]
            try:
                self.rivals[name] = getattr(importlib.import_module(module), entry)(shape, *projections)
            except Exception as error:  # a rival that is not installed or refuses the shape
                self.absent[name] = one_line(error)

    def rounds(self, tokens):
        layers = routings(self.shape, tokens)
        most = max(routing.rows for routing in layers)
        x = torch.randn(most, self.shape.hidden, device="cuda", dtype=torch.bfloat16)
        y = torch.randn(most, self.shape.inter, device="cuda", dtype=torch.bfloat16)
        return layers, [(routing, x[:routing.rows], y[:routing.rows]) for routing in layers]

    def check(self, name, arguments):
        reference, call = self.rivals["torch_bf16"].bind(*arguments), self.rivals[name].bind(*arguments)
        reference()
        call()
        error = max(map(relative_error, call.results(), reference.results()))
        if not error <= BOUNDS.get(name, BOUND):
            raise ValueError(f"its results differ from torch's by {error:.2g}")

    def time(self, name, tokens, rounds):
        if tokens in CHECKED_TOKENS:
            self.check(name, rounds[0])
        return median_microseconds([self.rivals[name].bind(*arguments) for arguments in rounds], rested=self.rested)

    def row(self, tokens, ours, layer):
        layers, rounds = self.rounds(tokens)
        times, absent = {"ours": ours} if ours else {}, dict(self.absent)
        for name in self.rivals:
            try:
                times[name] = round(self.time(name, tokens, rounds), 1)
            except Exception as error:  # refused, wrong or too large: said in the record
                absent[name] = one_line(error)
            gc.collect()
            torch.cuda.empty_cache()
        active = sum(routing.active for routing in layers) / len(layers)
        return {"part": "rivals", "shape": self.shape.name, "tokens": tokens, "active": round(active, 1),
                "rows": layers[0].rows, "us": times, "layer_us": layer, "absent": absent, "rested": self.rested}

    def compile(self, tokens):
        """Runs every rival once at each token count, so that what is compiled at run time is in its cache."""
        for count in tokens:
            for arguments in self.rounds(count)[1][:1]:
                for name, rival in self.rivals.items():
                    try:
                        rival.bind(*arguments)()
                        torch.cuda.synchronize()
                    except Exception as error:
                        print(self.shape.name, count, name, one_line(error), flush=True)


def ours(program, shape, tokens, rested):
    part = "rested" if rested else "gemms"
    command = [program, *[part] * rested, shape.name, *map(str, tokens)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {row["tokens"]: row for row in map(json.loads, lines) if row["part"] == part and row["tile"] < 0}


def our_layers(command, shape, tokens):
    """Microseconds of a whole layer at each token count."""
    name = f"{shape.hidden},{shape.inter},{shape.experts},{shape.top_k}" if shape.gated else "nemotron-nano"
    words = [command, "bench", "--shape", name, "--backend", "sm90", "--tokens", ",".join(map(str, tokens)), "--seconds", "0.1",
             "--json"]
    cases = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)["cases"]
    return {case["tokens"]: case["median_us"] for case in cases if case["routing"] == "random"}


def versions():
    found = {"torch": torch.__version__}
    for name, module in (("triton", "triton"), ("humming", "humming_grouped"), ("deep_gemm", "deepgemm_grouped")):
        try:
            module = importlib.import_module(module)
            found[name] = getattr(module, "VERSION", None) or module.__version__
        except Exception as error:
            found[name] = f"absent: {one_line(error)}"
    return found


def show(row):
    times = row["us"]
    mine = times.get("ours")
    rest = "  ".join(f"{name} {us:.1f} ({us / mine:.2f}x)" if mine else f"{name} {us:.1f}"
                     for name, us in times.items() if name != "ours")
    layer = f" (layer {row['layer_us']:.1f})" if row["layer_us"] else ""
    print(f"{row['shape']} T={row['tokens']} ({row['active']} experts): ours {mine}{layer}  {rest}", flush=True)


def repeat(args):
    """The command, with words for what differs between machines."""
    words = ["bench/rivals/compare.py"] + ["--program PROGRAM"] * bool(args.program) + ["--command COMMAND"] * bool(args.command)
    words += ["--rested"] * args.rested
    return " ".join(words + ["--output FILE", "--shapes", *args.shapes, "--tokens", *map(str, args.tokens), "--rivals", *args.rivals])


def measure(args):
    rows = [{"part": "device", "name": torch.cuda.get_device_name(), "versions": versions()}]
    for name in args.shapes:
        rows += [row | {"shape": name} for row in run_torch()]
        print(rows[0], rows[-1], flush=True)
        mine = ours(args.program, SHAPES[name], args.tokens, args.rested) if args.program else {}
        rows += mine.values()
        layers = our_layers(args.command, SHAPES[name], args.tokens) if args.command and not args.rested else {}
        contest = Contest(SHAPES[name], args.rivals, args.rested)
        print(f"{name}: absent {contest.absent}", flush=True)
        for tokens in args.tokens:
            rows.append(contest.row(tokens, mine[tokens]["both_us"] if mine else None, layers.get(tokens)))
            show(rows[-1])
            record = {"command": repeat(args), "rows": rows}
            args.output.write_text(json.dumps(record, indent=1) + "\n")  # so that a run cut short leaves what it has
        del contest
        gc.collect()
        torch.cuda.empty_cache()


def warm(args):
    shapes = [SHAPES[name] for name in args.shapes]
    modules = {RIVALS[name][0] for name in args.rivals}
    for module in map(importlib.import_module, modules):
        if hasattr(module, "compile_all"):
            module.compile_all(shapes, args.tokens)
    others = [name for name in args.rivals if not hasattr(importlib.import_module(RIVALS[name][0]), "compile_all")]
    for shape in shapes if others else ():
        Contest(shape, others).compile(args.tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="bench/sm90/gemms.cu, built; without it only rivals are measured")
    parser.add_argument("--command", help="fourmoe, built: whole layers of ours, too")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--rested", action="store_true", help="with a pause before each replay, not under load")
    parser.add_argument("--warm", action="store_true", help="compile what is compiled at run time, measure nothing")
    args = parser.parse_args()
    torch.manual_seed(5)
    if args.warm:
        warm(args)
    else:
        measure(args)


if __name__ == "__main__":
    main()
