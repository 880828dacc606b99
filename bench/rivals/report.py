#!/usr/bin/env python3
"""Joins records of compare.py (a shape or some token counts each), prints their table and draws them.

    python bench/rivals/report.py RECORD... --output bench/results/sm90-rivals.json --plots docs/plots

The table is Markdown: our microseconds, of the two GEMMs and of a whole layer, then every rival's time as a multiple of the
first, and Humming's as one of the second too. A multiple below 1 is a loss.
"""
import argparse
import json
import pathlib

from case import SHAPES

COLUMNS = {  # heading: names in the record, the fastest of which counts
    "Humming W4A16": ("humming_grouped", "humming_indexed"),
    "Triton NVFP4": ("triton_nvfp4",),
    "expand + torch": ("expand_torch",),
    "torch bf16": ("torch_bf16",),
    "Triton bf16": ("triton_bf16",),
    "DeepGEMM bf16": ("deepgemm_bf16",),
    "DeepGEMM FP8": ("deepgemm_fp8",),
}


def read(paths):
    """Joined: what several records have of a shape, under load or rested, is the first one's."""
    records = [json.loads(path.read_text()) for path in paths]
    rows = [row | {"run": run} for run, record in enumerate(records) for row in record["rows"]]
    first = {}
    for row in rows:
        if row["part"] == "rivals":
            first.setdefault((row["shape"], row.get("rested", False)), row["run"])
    rows = [row for row in rows if row["part"] != "rivals" or row["run"] == first[row["shape"], row.get("rested", False)]]
    return {"command": records[0]["command"], "rows": rows}


def contests(rows, rested=False):
    """Under load, or on a card that rested before each replay."""
    return sorted((row for row in rows if row["part"] == "rivals" and row.get("rested", False) == rested),
                  key=lambda row: (list(SHAPES).index(row["shape"]), row["tokens"]))


def ceilings_of(rows, row):
    """Of the run that measured the row."""
    return next(c for c in rows if c["part"] == "torch" and (c["run"], c["shape"]) == (row["run"], row["shape"]))


def fastest(row, names):
    return min((row["us"][name] for name in names if name in row["us"]), default=None)


def figures(rows, row):
    """Rates of ours: packed bytes against the copy rate, operations against the dense rate."""
    shape, seconds, ceilings = SHAPES[row["shape"]], row["us"]["ours"] * 1e-6, ceilings_of(rows, row)
    rate = row["active"] * shape.weights * 0.5625 / seconds * 1e-12
    flops = 2 * row["rows"] * shape.weights / seconds * 1e-12
    return rate, rate / ceilings["copy_TBps"], flops, flops / ceilings["dense_bf16_TFLOPs"]


def print_table(rows, tokens, rested=False):
    print("| shape | T | experts | ours us | TB/s | of copy | TFLOP/s | of dense |", " | ".join(COLUMNS),
          "| layer us | Humming / layer |")
    print("|---" * (10 + len(COLUMNS)) + "|")
    for row in contests(rows, rested):
        if tokens and row["tokens"] not in tokens:
            continue
        rate, of_copy, flops, of_dense = figures(rows, row)
        times = [fastest(row, names) for names in COLUMNS.values()]
        layer = row.get("layer_us")
        cells = [f"{us / row['us']['ours']:.2f}" if us else "-" for us in times]
        cells += [f"{layer:.1f}", f"{times[0] / layer:.2f}" if times[0] else "-"] if layer else ["-", "-"]
        print(f"| {row['shape']} | {row['tokens']} | {row['active']:.0f} | {row['us']['ours']:.1f} | {rate:.2f} | {of_copy:.0%} "
              f"| {flops:.0f} | {of_dense:.0%} |", " | ".join(cells), "|")


def print_extremes(rows, rested=False):
    """Where each rival comes closest."""
    for heading, names in COLUMNS.items():
        ratios = [(fastest(row, names) / row["us"]["ours"], row["shape"], row["tokens"])
                  for row in contests(rows, rested) if fastest(row, names)]
        if not ratios:
            print(f"{heading}: not measured")
            continue
        lost = [f"{shape} T={tokens} ({ratio:.2f})" for ratio, shape, tokens in sorted(ratios) if ratio < 1]
        least, most = min(ratios), max(ratios)
        print(f"{heading}: {least[0]:.2f} ({least[1]}, T={least[2]}) to {most[0]:.2f} ({most[1]}, T={most[2]}); "
              f"slower than it: {', '.join(lost) or 'nowhere'}")


def draw(rows, folder):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams["svg.hashsalt"] = "fourmoe"
    panels = {name: [row for row in contests(rows) if row["shape"] == name] for name in SHAPES}
    panels = {name: points for name, points in panels.items() if points}
    measured = {heading: names for heading, names in COLUMNS.items() if any(fastest(row, names) for row in contests(rows))}
    for kind, title in (("ratio", "time of a rival over ours (above 1: ours is faster)"), ("rate", "TFLOP/s")):
        figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), constrained_layout=True, sharey=kind == "ratio")
        for axis, (name, points) in zip(axes.flat, panels.items()):
            for heading, names in (measured if kind == "ratio" else {"ours": ("ours",)} | measured).items():
                line = [(row["tokens"], fastest(row, names), row) for row in points if fastest(row, names)]
                values = [us / row["us"]["ours"] if kind == "ratio" else
                          2e-6 * row["rows"] * SHAPES[name].weights / us for _, us, row in line]
                axis.plot([tokens for tokens, *_ in line], values, "o-", markersize=3, label=heading,
                          linewidth=2.5 if heading == "ours" else 1.2, color="black" if heading == "ours" else
                          f"C{list(COLUMNS).index(heading)}")
            heading, names = next(iter(COLUMNS.items()))
            rests = [row for row in contests(rows, rested=True) if row["shape"] == name and fastest(row, names)]
            if kind == "ratio" and rests:
                axis.plot([row["tokens"] for row in rests], [fastest(row, names) / row["us"]["ours"] for row in rests],
                          "o--", markersize=3, linewidth=1.2, color="C0", label=f"{heading}, both rested")
            ticks = [1, 8, 64, 512, 4096]
            axis.set(title=name, xscale="log", yscale="log", xlabel="tokens", xticks=ticks, xticklabels=ticks)
            layers = [row for row in points if row.get("layer_us")]
            if kind == "ratio" and layers:
                axis.plot([row["tokens"] for row in layers], [row["layer_us"] / row["us"]["ours"] for row in layers], "k:",
                          label="our whole layer")
            if kind == "ratio":
                axis.axhline(1, color="black", linewidth=2.5)
                axis.set(yticks=[0.5, 1, 1.4, 2, 3, 5, 10], yticklabels=["0.5", "1", "1.4", "2", "3", "5", "10"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        for axis in axes.flat[len(panels):]:
            axis.set_axis_off()
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8)
        figure.suptitle(f"gemm1 + gemm2 of 4-bit weights and bf16 tokens on one H200: {title}")
        figure.savefig(folder / ("sm90-rivals.svg" if kind == "ratio" else "sm90-rivals-rate.svg"), metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, help="the records joined")
    parser.add_argument("--plots", type=pathlib.Path, help="a folder")
    parser.add_argument("--tokens", nargs="+", type=int, help="lines of the table (all)")
    args = parser.parse_args()
    record = read(args.records)
    print_table(record["rows"], args.tokens)
    print_extremes(record["rows"])
    if contests(record["rows"], rested=True):
        print("rested:")
        print_table(record["rows"], args.tokens, rested=True)
        print_extremes(record["rows"], rested=True)
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plots:
        draw(record["rows"], args.plots)


if __name__ == "__main__":
    main()
