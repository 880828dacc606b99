#!/usr/bin/env python3
"""Turns the rows that gemms.cu prints into a record, a table and a plot.

    python bench/sm90/record.py ROWS --ceilings CEILINGS --output bench/results/sm90-gemms.json --plot FILE

CEILINGS is the record of ceilings.py from the same call: shares are of its device copy (bytes read plus written) and of
its dense bf16 GEMM. ROWS may also be a record of bench/rivals/compare.py, which holds rows and ceilings of its own.
"""
import argparse
import json
import pathlib
import subprocess


def read(path):
    """The rows of a record, or of the lines that gemms.cu prints."""
    text = path.read_text()
    try:
        return json.loads(text)["rows"]
    except json.JSONDecodeError:  # an object a line
        return [json.loads(line) for line in text.splitlines()]


def chosen_rows(rows):
    """The row of the tile that is chosen, for each (shape, tokens)."""
    return {(row["shape"], row["tokens"]): row for row in rows if row["part"] == "gemms" and row["tile"] < 0}


def rested_rows(rows):
    """The same of a card that rested between replays."""
    return {(row["shape"], row["tokens"]): row for row in rows if row["part"] == "rested" and row["tile"] < 0}


def best_rows(rows):
    """The row of the fastest tile of a sweep, for each (shape, tokens)."""
    best = {}
    for row in rows:
        if row["part"] == "gemms" and row["tile"] >= 0:
            key = row["shape"], row["tokens"]
            best[key] = min(best.get(key, row), row, key=lambda r: r["both_us"])
    return best


def ceilings_of(rows, shape):
    """Copy and dense rates of the run that measured the shape."""
    found = [row for row in rows if row["part"] == "torch" and row.get("shape", shape) == shape]
    return found[0]["copy_TBps"], found[0]["dense_bf16_TFLOPs"]


def print_table(rows):
    print(next(row for row in rows if row["part"] == "device")["name"])
    print("shape               T  experts  gemm1 us  gemm2 us   both us   TB/s  of copy  TFLOP/s  of dense  best tile")
    best, rested = best_rows(rows), rested_rows(rows)
    for (shape, tokens), row in chosen_rows(rows).items():
        copy, dense = ceilings_of(rows, shape)
        other = best.get((shape, tokens))
        sweep = f"{other['tile']} ({row['both_us'] / other['both_us'] - 1:+.0%})" if other else ""
        if (shape, tokens) in rested:
            of_copy = rested[shape, tokens]["TBps"] / copy
            sweep += f"  rested {rested[shape, tokens]['both_us']:.1f} us, {of_copy:.0%} of copy"
        print(f"{shape:14s} {tokens:6d} {row['active']:8.1f} {row['gemm1_us']:9.1f} {row['gemm2_us']:9.1f} "
              f"{row['both_us']:9.1f} {row['TBps']:6.2f} {row['TBps'] / copy:8.0%} {row['TFLOPs']:8.1f} "
              f"{row['TFLOPs'] / dense:9.0%}  {sweep}")


def draw(rows, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams["svg.hashsalt"] = "fourmoe"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True, sharey=True)
    chosen = chosen_rows(rows)
    for shape in dict.fromkeys(key[0] for key in chosen):
        copy, dense = ceilings_of(rows, shape)
        points = sorted((tokens, row["TBps"] / copy, row["TFLOPs"] / dense)
                        for (name, tokens), row in chosen.items() if name == shape)
        tokens, of_copy, of_dense = zip(*points)
        left.plot(tokens, of_copy, "o-", markersize=3, label=shape)
        right.plot(tokens, of_dense, "o-", markersize=3, label=shape)
    left.set(title="packed bytes against the copy rate", ylabel="share", ylim=(0, 1.1))
    right.set(title="operations against dense bf16 8192^3")
    for axis in (left, right):
        axis.set(xlabel="tokens", xscale="log")
        axis.axhline(1, color="grey", linestyle=":")
        axis.grid(alpha=0.3)
    right.legend()
    figure.suptitle("gemm1 + gemm2 on one H200")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--ceilings", type=pathlib.Path, help="if ROWS holds none")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    rows = read(args.rows)
    if args.ceilings:
        rows += [row for row in read(args.ceilings) if row["part"] == "torch"]
    print_table(rows)
    if args.output:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"command": "scripts/gpu_check.sh FOLDER", "commit": commit or "unknown", "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
