#!/usr/bin/env python3
"""Turns the rows that gemms.cu prints into a record, a table of the best tile for each case, and a plot.

    python bench/sm90/record.py ROWS --ceilings CEILINGS --output bench/results/sm90-gemms.json

CEILINGS is the record of ceilings.py from the same call: shares are of its device copy (bytes read plus written).
"""
import argparse
import json
import pathlib
import subprocess


def best_rows(rows):
    """The fastest N of each (shape, tokens), in the order of the file."""
    best = {}
    for row in rows:
        if row["part"] == "gemms":
            key = row["shape"], row["tokens"]
            if key not in best or row["gemm1_us"] + row["gemm2_us"] < best[key]["gemm1_us"] + best[key]["gemm2_us"]:
                best[key] = row
    return best


def copy_of(rows):
    return next(row["copy_TBps"] for row in rows if row["part"] == "torch")


def print_table(rows):
    device = next(row for row in rows if row["part"] == "device")
    print(f"{device['name']}, copy {copy_of(rows):.2f} TB/s")
    print("shape          T  experts    N  gemm1 us  gemm2 us   TB/s  of copy  TFLOP/s")
    for (shape, tokens), row in best_rows(rows).items():
        print(f"{shape:12s} {tokens:6d} {row['active']:6.1f} {row['N'] or 'class':>6} {row['gemm1_us']:9.1f} {row['gemm2_us']:9.1f} "
              f"{row['TBps']:6.2f} {row['TBps'] / copy_of(rows):7.0%} {row['TFLOPs']:8.1f}")


def draw(rows, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    best = best_rows(rows)
    for shape in dict.fromkeys(key[0] for key in best):
        points = [(tokens, row["TBps"] / copy_of(rows)) for (name, tokens), row in best.items() if name == shape]
        axis.plot(*zip(*points), "o-", label=shape)
    axis.set(title="gemm1 + gemm2 on one H200: packed bytes against the copy rate", xlabel="tokens", xscale="log",
             ylabel="share of the copy rate", ylim=(0, 1.1))
    axis.axhline(1, color="grey", linestyle=":")
    axis.legend()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--ceilings", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    rows += [row for row in json.loads(args.ceilings.read_text())["rows"] if row["part"] == "torch"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print_table(rows)
    record = {"command": "scripts/gpu_check.sh FOLDER", "commit": commit or "unknown", "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
