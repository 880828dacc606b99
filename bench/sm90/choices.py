#!/usr/bin/env python3
"""Compares what layers take with the best of all plans, from what `fourmoe tune --json` printed: record, table, plot.

    for shape in ...; do fourmoe tune --shape $shape --tokens 1,2,3,... --seconds 0.02 --dry-run --json > $shape.json; done
    python bench/sm90/choices.py *.json --output bench/results/sm90-choices.json --plot docs/plots/sm90-choices.svg
"""
import argparse
import json
import pathlib
import subprocess


def words(steps):
    return " + ".join(step.removeprefix("sm90.") for step in steps if step.startswith("sm90."))


def fastest(plans, length=None):
    """The fastest plan, or of those with so many steps; None where there is none."""
    timed = [p for p in plans if p["us"] and length in (None, len(p["steps"]))]
    return min(timed, key=lambda p: p["us"], default=None)


def row_of(shape, case):
    plans = case["plans"]
    default, best, whole, split = plans[0], fastest(plans), fastest(plans, 1), fastest(plans, 4)
    return {"shape": shape, "tokens": case["tokens"], "by": case["source"], "default": words(default["steps"]),
            "default_us": round(default["us"], 2), "best": words(best["steps"]), "best_us": round(best["us"], 2),
            "whole_us": whole and round(whole["us"], 2), "split_us": split and round(split["us"], 2),
            "plans": len(plans), "floor_us": round(case["floor_us"], 2)}


def print_table(rows):
    print("shape                T  by       default us  best us          whole us  split us  default")
    for row in rows:
        print(f"{row['shape']:16s} {row['tokens']:5d}  {row['by']:7s} {row['default_us']:10.1f} {row['best_us']:9.1f} "
              f"{row['default_us'] / row['best_us'] - 1:+6.1%} {row['whole_us'] or 0:9.1f} {row['split_us'] or 0:9.1f}"
              f"  {row['default']}  (best: {row['best']})")
    worst = max(rows, key=lambda row: row["default_us"] / row["best_us"])
    print(f"{len(rows)} cases, worst {worst['default_us'] / worst['best_us'] - 1:+.1%} at {worst['shape']} "
          f"T={worst['tokens']}; above 5 %: "
          f"{sum(row['default_us'] > 1.05 * row['best_us'] for row in rows)}, above 3 %: "
          f"{sum(row['default_us'] > 1.03 * row['best_us'] for row in rows)}")


def draw(rows, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    matplotlib.rcParams["svg.hashsalt"] = "fourmoe"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        tokens = [row["tokens"] for row in mine]
        left.plot(tokens, [row["best_us"] / row["default_us"] for row in mine], "o-", markersize=3, label=shape)
        both = [row for row in mine if row["whole_us"] and row["split_us"]]
        right.plot([row["tokens"] for row in both], [row["split_us"] / row["whole_us"] for row in both], "o-",
                   markersize=3, label=shape)
    left.set(title="what is taken, against the best of all plans", ylabel="share of the best's speed", ylim=(0.8, 1.02))
    left.axhline(0.95, color="grey", linestyle=":")
    right.set(title="one launch for the layer, against the split steps", ylabel="times as fast")
    right.axhline(1, color="grey", linestyle=":")
    for axis in (left, right):
        axis.set(xlabel="tokens", xscale="log")
        axis.grid(alpha=0.3)
    left.legend()
    figure.suptitle("choices on one H200: cold weights, random routing, graph replay")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", help="a file a shape, named after it")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    runs = {path.stem: json.loads(path.read_text()) for path in args.runs}
    rows = [row_of(shape, case) for shape, run in runs.items() for case in run["cases"]]
    print_table(rows)
    if args.output:
        first = next(iter(runs.values()))
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        record = {"command": "fourmoe tune --shape SHAPE --tokens "
                             f"{','.join(str(case['tokens']) for case in first['cases'])} "
                             f"--seconds {first['seconds']:g} --dry-run --json",
                  "commit": commit or "unknown", "device": first["machine"]["devices"][0]["name"],
                  "copy_TBps": {shape: round(run["copy_bytes_per_second"] / 1e12, 3) for shape, run in runs.items()},
                  "rows": rows}
        head, tail = json.dumps({**record, "rows": []}, indent=1).rsplit("[]", 1)
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        args.output.write_text(f"{head}[\n  {lines}\n ]{tail}\n")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
