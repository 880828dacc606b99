#!/usr/bin/env python3
"""Measures the cpu room, and ggml's CPU backend where bench/rivals is built, in one run; writes record, table and plot.

    python bench/cpu/compare.py --command build/fourmoe --ggml build-rivals/ggml_moe \\
        --output bench/results/cpu-qwen3-30b.json --plot docs/plots/cpu-qwen3-30b.svg

A row is one call of `fourmoe bench` for each precision, which measures the machine's ceilings beside it, then ggml's
calls for the same token count, then `fourmoe bench` once more. Virtual machines change their speed, by half where two
of their processors come to share a core: of several rounds the row is kept whose slowest read ceiling is the fastest.
"""
import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile

# dsv3-expert: DeepSeek-V3's experts, 32 of its 256, so that two layers of them fit small machines.
SHAPES = {"qwen3-30b": "2048,768,128,8", "dsv3-expert": "7168,2048,32,8"}
QUANTISED = ("w4a4", "w4a8_int8")
RIVALS = [("nvfp4", False), ("mxfp4", True), ("q4_0", True), ("q4_K", True)]


def bench(args, tokens, precision, threads):
    """One call of fourmoe bench: its record, with the case of random routing alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "record.json"
        command = [args.command, "bench", "--shape", SHAPES[args.shape], "--tokens", str(tokens), "--precision", precision,
                   "--threads", str(threads), "--seconds", str(args.seconds), "--output", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        record = json.loads(path.read_text())
    record["case"] = next(case for case in record.pop("cases") if case["routing"] == "random")
    return record


def rival(args, kind, repack, tokens):
    """ggml's row for one type of weights, or None where it has no such type."""
    command = [args.ggml, kind, str(tokens), "--seconds", str(args.seconds), "--threads", str(args.threads),
               "--shape", SHAPES[args.shape]] + (["--repack"] if repack else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"ggml {kind}: {done.stderr.strip() or done.returncode}")
        return None
    return json.loads(done.stdout)


def measure_row(args, tokens):
    row = {"tokens": tokens, "w4a16": bench(args, tokens, "w4a16", args.threads)}
    for name in QUANTISED:
        row[name] = bench(args, tokens, name, args.threads)
    if args.threads > 1:
        row["one_thread"] = bench(args, tokens, "w4a16", 1)
    row["ggml"] = [found for kind, repack in RIVALS if args.ggml for found in [rival(args, kind, repack, tokens)]
                   if found]
    row["again"] = bench(args, tokens, "w4a16", args.threads)
    return row


def slowest_read(row):
    return min(row[name]["ceilings"]["read_bytes_per_second"] for name in ("w4a16", *QUANTISED, "again"))


def measure(args):
    kept = json.loads(args.output.read_text())["rows"] if args.add and args.output.exists() else []
    rows = [row for row in kept if row["tokens"] not in args.tokens]
    for tokens in args.tokens:
        row = max((measure_row(args, tokens) for _ in range(args.rounds)), key=slowest_read)
        rows = sorted([*rows, row], key=lambda row: row["tokens"])
        print_row(row)
        write(args, rows)
    return rows


def write(args, rows):
    """After each row, so that a run that is cut short leaves what it measured."""
    record = {"command": shlex.join(["python", *sys.argv]), "shape": args.shape,
              "threads": args.threads, "rounds": args.rounds, "ggml": args.ggml_version, "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


def cells(row):
    ours, case = row["w4a16"], row["w4a16"]["case"]
    ceilings = ours["ceilings"]
    yield f"{row['tokens']:6d}"
    yield f"{ceilings['read_bytes_per_second'] / 1e9:7.1f} {ceilings['flops_per_second'] / 1e12:6.2f}"
    yield f"{case['median_us']:9.0f} {case['share_of_read']:6.0%} {case['share_of_peak']:6.0%}"
    for name in QUANTISED:
        yield f"{row[name]['case']['median_us']:9.0f} {row[name]['case']['share_of_read']:6.0%}"
    if "one_thread" in row:
        yield f"{row['one_thread']['case']['median_us'] / case['median_us']:6.2f}"
    for found in row["ggml"]:
        yield f"{found['type']}{'*' if found['repacked'] else ''} {found['median_us'] / case['median_us']:5.1f}x"


def print_row(row):
    print("  ".join(cells(row)), flush=True)


def draw(rows, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    names = dict.fromkeys((found["type"], found["repacked"]) for row in rows for found in row["ggml"])
    panels = 2 if names else 1
    figure, axes = plt.subplots(1, panels, figsize=(5 * panels, 4), constrained_layout=True, squeeze=False)
    draw_shares(axes[0][0], rows)
    if names:
        draw_rivals(axes[0][1], rows, names)
    figure.savefig(path)


def draw_shares(axis, rows):
    tokens = [row["tokens"] for row in rows]
    for name in ("w4a16", *QUANTISED):  # older rows lack a precision
        points = [(row["tokens"], row[name]["case"]["share_of_read"]) for row in rows if name in row]
        axis.plot(*zip(*points), "o-", label=f"{name}, of read")
    axis.plot(tokens, [row["w4a16"]["case"]["share_of_peak"] for row in rows], "s--", label="w4a16, of AMX bf16")
    axis.set(title="share of the ceilings of the same call", xlabel="tokens", xscale="log", ylim=(0, 1))
    axis.legend()


def draw_rivals(axis, rows, names):
    for kind, repacked in names:
        points = [(row["tokens"], found["median_us"] / row["w4a16"]["case"]["median_us"]) for row in rows
                  for found in row["ggml"] if (found["type"], found["repacked"]) == (kind, repacked)]
        axis.plot(*zip(*points), "o-", label=f"ggml {kind}{', repacked' if repacked else ''}")
    axis.set(title="ggml's time over w4a16's", xlabel="tokens", xscale="log", yscale="log")
    axis.axhline(1, color="grey", linestyle=":")
    axis.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", default="build/fourmoe")
    parser.add_argument("--ggml", help="the program that bench/rivals builds")
    parser.add_argument("--ggml-version", help="what it was built against, for the record")
    parser.add_argument("--shape", default="qwen3-30b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 4, 16, 128, 512, 1024],
                        help="none, with --add: only draw what is recorded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--add", action="store_true", help="keep the record's rows of other token counts: a run in pieces")
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    print("tokens  read GB/s, peak TFLOP/s  w4a16 us, of read, of peak  w4a4 us, of read  w4a8_int8 us, of read  speed-up of threads  ggml's time "
          "over w4a16's (*: repacked)")
    rows = measure(args)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
