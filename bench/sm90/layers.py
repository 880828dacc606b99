#!/usr/bin/env python3
"""Joins what `fourmoe bench --output` wrote of whole layers into one record and draws it.

    python bench/sm90/layers.py FOLDER/sm90-layer-*.json --output bench/results/sm90-layers.json
    python bench/sm90/layers.py bench/results/sm90-layers.json --plans bench/results/sm90-medium-batches.json \
        --plot docs/plots/sm90-layers.svg
"""
import argparse
import json
import pathlib


def layers_of(path):
    read = json.loads(path.read_text())
    return read.get("layers", [read])


def with_words(layer, *words):
    """Calls of random picks, if the layer was measured with just these words of the command."""
    cases = [case for case in layer["cases"] if case["routing"] == "random"]
    asked = {word for word in ("--logits", "--shared") if word in cases[0]["command"]}
    return cases if asked == set(words) else []


def draw(layers, plans, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams["svg.hashsalt"] = "fourmoe"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for at, shape in enumerate(dict.fromkeys(row["shape"] for row in plans)):
        for plan, style in (("split steps", ":"), ("one launch", "-")):
            mine = [row for row in plans if (row["shape"], row["plan"], row["picks"]) == (shape, plan, "given")]
            left.plot([row["tokens"] for row in mine], [row["best_us"] / row["floor_us"] for row in mine], "o" + style,
                      color=f"C{at}", markersize=3, label=shape if style == "-" else None)
    left.set(title="one launch, and the split steps (dotted)", ylabel="time over that of the weights' bytes", ylim=(1, 2.4))
    for at, layer in enumerate(layer for layer in layers if with_words(layer)):
        cases = with_words(layer)
        right.plot([case["tokens"] for case in cases], [case["share_of_copy"] for case in cases], "o-", markersize=3,
                   label=layer["weights"].removeprefix("random, "))
    right.set(title="share of the copy rate", ylim=(0, 1))
    for axis in (left, right):
        axis.set(xlabel="tokens", xscale="log")
        axis.set_xticks([8, 16, 32, 64] if axis is left else [1, 8, 64, 512], minor=False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle("whole layers on one H200: cold weights, random picks, graph replay")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plans", type=pathlib.Path, help="record of both plans, for the plot's left half")
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    layers = [layer for path in args.runs for layer in layers_of(path)]
    if args.output:
        record = {"command": "scripts/gpu_check.sh FOLDER speed", "layers": layers}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(layers, json.loads(args.plans.read_text())["rows"] if args.plans else [], args.plot)


if __name__ == "__main__":
    main()
