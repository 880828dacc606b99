#!/usr/bin/env python3
"""Keeps the support table of README.md equal to what the command prints from src/backends/list.cc.

Usage: support_table.py --write | --check  [--command build/fourmoe]
"""

import argparse
import pathlib
import subprocess
import sys

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support table: begin -->\n", "<!-- support table: end -->\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="put the command's table into README.md")
    mode.add_argument("--check", action="store_true", help="fail when README.md holds another table")
    parser.add_argument("--command", default=README.parent / "build" / "fourmoe", help="the fourmoe command")
    options = parser.parse_args()

    printed = subprocess.run([options.command, "support", "--markdown"], check=True, capture_output=True, text=True)
    table = printed.stdout.strip() + "\n"
    text = README.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"support_table.py: README.md needs one '{BEGIN.strip()}' and one '{END.strip()}'")
    before, rest = text.split(BEGIN)
    held, after = rest.split(END)
    if held == table:
        return
    if options.check:
        sys.exit("support_table.py: the table in README.md is old; run: python3 scripts/support_table.py --write")
    README.write_text(before + BEGIN + table + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
