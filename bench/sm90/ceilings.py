#!/usr/bin/env python3
"""Builds and runs ceilings.cu on a Hopper GPU, beside the ceilings that torch reaches, and writes record and plot.

    python bench/sm90/ceilings.py --output bench/results/sm90-ceilings.json --plot docs/sm90-ceilings.svg

Needs nvcc and a torch with CUDA; matplotlib for the plot.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++20", "-O3", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT / 'src'}", "--expt-relaxed-constexpr"]


def run_program():
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "ceilings"
        subprocess.run(["nvcc", *FLAGS, str(ROOT / "bench/sm90/ceilings.cu"), "-o", str(program)], check=True)
        lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def median_seconds(work, warm=0.3, measured=0.2):
    """Median after the card has worked for `warm` seconds: clocks fall under load, as in gemms.cu."""
    import torch
    times, spent = [], 0.0
    while spent < warm + measured or len(times) < 5:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) * 1e-3
        spent += seconds
        if spent > warm:
            times.append(seconds)
    return statistics.median(times)


def run_torch():
    """Dense bf16 8192^3 on random data, and a device-to-device copy of 4 GiB counted as read plus write."""
    import torch
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(-2**31, 2**31 - 1, (2**30,), device="cuda", dtype=torch.int32)
    target = torch.empty_like(source)
    dense = 2 * 8192**3 / median_seconds(lambda: torch.mm(a, b)) * 1e-12
    copy = 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source)) * 1e-12
    return [{"part": "torch", "dense_bf16_TFLOPs": round(dense, 1), "copy_TBps": round(copy, 3),
             "torch": torch.__version__}]


def print_table(rows):
    torch_row = next(row for row in rows if row["part"] == "torch")
    print(f"dense bf16 8192^3 {torch_row['dense_bf16_TFLOPs']} TFLOP/s, copy {torch_row['copy_TBps']} TB/s")
    streams = sorted((row for row in rows if row["part"] == "stream"), key=lambda row: -row["TBps"])
    for row in streams[:6] + streams[-2:]:
        print(f"stream: tiles of {row['tile']:6d} bytes, {row['stages']:2d} stages: {row['TBps']:.3f} TB/s")
    for row in rows:
        if row["part"] == "rate":
            print(f"N={row['columns']:3d} {row['groups']}x{row['rows']} {row['unpack']:9s} {row['TFLOPs']:7.1f} TFLOP/s "
                  f"{row['packed_TBps']:6.3f} TB/s packed, {row['registers']} registers, {row['spilled']} bytes spilled")


def draw(rows, path):
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for tile in sorted({row["tile"] for row in rows if row["part"] == "stream"}):
        points = [row for row in rows if row["part"] == "stream" and row["tile"] == tile]
        left.plot([row["stages"] * tile / 1024 for row in points], [row["TBps"] for row in points], "o-",
                  label=f"{tile} B")
    left.set(title="bulk copies into shared memory", xlabel="KiB in flight a CTA", ylabel="TB/s", xscale="log")
    left.legend(title="tile")
    columns = sorted({row["columns"] for row in rows if row["part"] == "rate"})
    for unpack in ("constant", "single", "paired"):
        best = [max(row["packed_TBps"] for row in rows
                    if row["part"] == "rate" and row["columns"] == n and row["unpack"] == unpack) for n in columns]
        right.plot(columns, best, "o-", label=unpack)
    copy = next(row["copy_TBps"] for row in rows if row["part"] == "torch")
    right.axhline(copy, color="grey", linestyle=":", label="device copy")
    right.set(title="packed weights into the tensor core", xlabel="tokens a tile (N)", ylabel="TB/s of packed bytes",
              xscale="log", xticks=columns, xticklabels=columns)
    right.legend(title="unpacking")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--plot", type=pathlib.Path)
    args = parser.parse_args()
    rows = run_torch() + run_program()
    print_table(rows)
    record = {"command": "python bench/sm90/ceilings.py --output FILE --plot FILE", "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
