#!/usr/bin/env python3
"""Builds the corpus of the tiny model from three public-domain texts that Debian packages.

    apt-get install bible-kjv dict-jargon dict-devil
    python prepare_text.py --out text

Writes `train.bin` and `heldout.bin`: plain bytes, no tokenizer. The last part of every source is
held out, so that held-out text is never a window away from text that was trained on.
"""
import argparse
import gzip
import hashlib
import pathlib
import subprocess


def bible() -> bytes:
    """The King James Version, as the package's own reader prints it (its data file has a format of its own)."""
    return subprocess.run(["bible", "-l72", "gen1:1-rev22:21"], check=True, capture_output=True).stdout


def dictionary(dictd: pathlib.Path, name: str, first_words: bytes) -> bytes:
    """A dictd database is gzipped text; what comes before the first entry is notices of the packager."""
    text = gzip.decompress((dictd / f"{name}.dict.dz").read_bytes())
    return text[text.index(first_words):]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictd", type=pathlib.Path, default="/usr/share/dictd", help="folder of the dictd databases")
    parser.add_argument("--heldout", type=float, default=0.03, help="share of each source, at its end, to hold out")
    parser.add_argument("--out", type=pathlib.Path, default="text", help="folder to write")
    args = parser.parse_args()

    sources = {
        "bible-kjv": bible(),
        "dict-jargon": dictionary(args.dictd, "jargon", b"\n(TM)\n"),
        "dict-devil": dictionary(args.dictd, "devil", b"PREFACE\n"),
    }
    train, heldout = b"", b""
    for name, text in sources.items():
        cut = len(text) - int(len(text) * args.heldout)
        train += text[:cut]
        heldout += text[cut:]
        print(f"{name:12} {len(text):8} bytes, held out {len(text) - cut}")

    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in (("train.bin", train), ("heldout.bin", heldout)):
        (args.out / name).write_bytes(text)
        print(f"{name:12} {len(text):8} bytes, sha256 {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main()
