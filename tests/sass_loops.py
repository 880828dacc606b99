#!/usr/bin/env python3
"""Looks at the loops of products in compiled Hopper kernels: none may move descriptors between register files.

    python tests/sass_loops.py BINARY_OR_OBJECT...

ptxas keeps what such a loop counts in registers of each lane when it takes a warp for divided, and then moves it to the
uniform registers before every product (R2UR): up to half again as many instructions, without a warning
(docs/hopper-lab.md). Prints the loops that do, or how many were looked at. Needs cuobjdump, CUOBJDUMP in the environment
names another.
"""
import os
import re
import subprocess
import sys

FAR = 150  # instructions between two products: of two loops


def kernels(path):
    """(name, instructions) of each."""
    dump = subprocess.run([os.environ.get("CUOBJDUMP", "cuobjdump"), "-sass", path], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, check=True).stdout
    name, instructions = None, []
    for line in dump.splitlines():
        if start := re.search(r"Function : (\S+)", line):
            yield name, instructions
            name, instructions = start.group(1), []
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(found.group(1))
    yield name, instructions


def loops(instructions):
    """(first, last) product of each."""
    found = []
    for at, instruction in enumerate(instructions):
        if "HGMMA" not in instruction:
            continue
        if found and at - found[-1][1] <= FAR:
            found[-1][1] = at
        else:
            found.append([at, at])
    return found


def main():
    looked_at, broken = 0, 0
    for path in sys.argv[1:]:
        for name, instructions in kernels(path):
            for first, last in loops(instructions):
                moves = sum("R2UR" in instruction for instruction in instructions[first:last])
                looked_at, broken = looked_at + 1, broken + (moves > 0)
                if moves:
                    print(f"{name}: {last - first} instructions from first to last product, {moves} of them R2UR")
    print(f"loops of products: {looked_at} looked at, {broken} with R2UR")
    return 1 if broken or not looked_at else 0


if __name__ == "__main__":
    sys.exit(main())
