#!/usr/bin/env python3
"""Draws the loss curve that train.py logged.

    python plot.py --log training.json --out training.svg
"""
import argparse
import json
import pathlib

import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=pathlib.Path, default="training.json")
    parser.add_argument("--out", type=pathlib.Path, default="training.svg")
    args = parser.parse_args()

    curve = json.loads(args.log.read_text())["curve"]
    epochs = [row["epoch"] for row in curve]
    # Plain text and no date keep the file small and the same from run to run.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tiny-moe", "font.size": 10})
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(epochs, [row["train_bits_per_byte"] for row in curve], color="0.65", label="training, the step's batch")
    axes.plot(epochs, [row["heldout_bits_per_byte"] for row in curve], color="tab:blue", label="held-out text")
    axes.set(xlabel="epoch", ylabel="bits per byte", ylim=(0.9, 2.2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
