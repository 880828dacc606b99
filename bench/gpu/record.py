#!/usr/bin/env python3
"""Turns the rows that route.cu prints into a record and a table.

    python bench/gpu/record.py ROWS --output bench/results/gpu-route.json

Shares are of a device copy (bytes read plus written) in the same run.
"""
import argparse
import json
import pathlib
import subprocess


def print_table(rows):
    device = next(row for row in rows if row["part"] == "device")
    print(f"{device['name']}, copy {device['copy_GBps'] / 1000:.2f} TB/s; microseconds, shares of the copy rate")
    print("shape          T   logits    slots    gather       quantise       combine   slots+combine  with gather")
    for r in rows:
        if r["part"] == "stages":
            print(f"{r['shape']:10s} {r['tokens']:6d} {r['logits_us']:8.1f} {r['slots_us']:8.1f} "
                  f"{r['gather_us']:8.1f} {r['gather_of_copy']:4.0%} {r['quantise_us']:8.1f} {r['quantise_of_copy']:4.0%} "
                  f"{r['combine_us']:8.1f} {r['combine_of_copy']:4.0%} {r['slots_combine_us']:12.1f} "
                  f"{r['slots_gather_combine_us']:12.1f}")
    for r in rows:
        if r["part"] == "combine":
            print(f"combine {r['shape']:10s} {r['tokens']:6d} {r['way']:14s} {r['us']:8.2f} us {r['of_copy']:5.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print_table(rows)
    record = {"command": "scripts/gpu_check.sh FOLDER", "commit": commit or "unknown", "rows": rows}
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
