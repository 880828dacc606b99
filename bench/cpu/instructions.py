#!/usr/bin/env python3
"""Counts the instructions of the cpu room's inner loops and compares them with the record, or writes it (--record).

Counts are of executed instructions (bench/cpu/steps.cc), so they show a slower kernel where times are noise. They belong to
one compiler: other builds, and machines that refuse single steps, are skipped (exit status 77). Levels that this machine
lacks are left out of a comparison, and kept as they are in the record.
"""
import argparse
import json
import pathlib
import re
import subprocess
import sys

RECORD = pathlib.Path(__file__).parent.parent / "results" / "cpu-instructions.json"
MOST = 0.02  # of a count may it change: fewer can be a fault too, as when a compiler drops prefetches
SKIPPED = 77
KEY = ("level", "format", "tokens")
BUILD = r"GNU 12\.\S+ RelWithDebInfo"

# Operands in AT&T's syntax. With vectors on its stack a function holds them below %rbp.
STACK = re.compile(r"\(%rsp|-0x[0-9a-f]+\(%rbp\)")


def skip(reason):
    print(f"skipped: {reason}")
    sys.exit(SKIPPED)


def disassemble(program):
    """Instructions of the program by address, in hex as objdump writes it."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", program], check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r"^ +([0-9a-f]+):\t(.+)$", text, re.M))


def measure(program):
    """One row a case: instructions for a block of 16 x 16 weights, how many of them have a memory operand, and how many one
    on the stack (spilled registers, and what a kernel keeps there on purpose)."""
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode != 0:
        skip(done.stderr.strip() or f"{program} ended with {done.returncode}")
    lines = disassemble(program)

    def per_block(case, of):
        return round(sum(n for at, n in case["steps"].items() if of(lines[at])) / case["blocks"], 3)

    def in_memory(line):
        return "(%" in line and not line.startswith(("lea", "nop"))

    return [{**{name: case[name] for name in KEY}, "instructions": per_block(case, lambda line: True),
             "memory": per_block(case, in_memory),
             "stack": per_block(case, lambda line: in_memory(line) and STACK.search(line))}
            for case in json.loads(done.stdout)]


def key(row):
    return tuple(row[name] for name in KEY)


def print_table(rows, before):
    print(f"{'level':9} {'weights':8} {'tokens':>6} {'instructions':>13} {'memory':>8} {'stack':>8}   recorded")
    for row in rows:
        known = before.get(key(row), {}).get("instructions", "-")
        print(f"{row['level']:9} {row['format']:8} {row['tokens']:6} {row['instructions']:13.2f} {row['memory']:8.2f} "
              f"{row['stack']:8.2f}   {known}")


def write(rows, before, build):
    found = {key(row) for row in rows}
    levels = {row["level"] for row in rows}
    rows = rows + [row for row in before.values() if key(row) not in found and row["level"] not in levels]
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    RECORD.write_text(f'{{\n  "command": "make counts",\n  "build": {json.dumps(build)},\n'
                      f'  "counts": "executed instructions a block of 16 x 16 weights, all tokens of a tile",\n'
                      f'  "cases": [\n{lines}\n  ]\n}}\n')


def compare(rows, before):
    """Sentences about what is not as in the record."""
    for row in rows:
        if key(row) not in before:
            yield f"{key(row)} is not in the record"
            continue
        was = before[key(row)]["instructions"]
        if abs(row["instructions"] - was) > was * MOST:
            yield f"{key(row)}: {row['instructions']} instructions a block, {was} in the record"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", required=True, help="fourmoe_steps")
    parser.add_argument("--build", required=True, help="compiler, its version, type of build, flags")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name} instead of comparing with it")
    args = parser.parse_args()
    build = args.build.strip()
    if not re.fullmatch(BUILD, build):
        skip(f"counts are of gcc 12 with the default flags and type of build; this build is '{build}'")
    before = {key(row): row for row in json.loads(RECORD.read_text())["cases"]} if RECORD.exists() else {}
    rows = measure(args.program)
    print_table(rows, before)
    if args.record:
        write(rows, before, build)
        return 0
    missing = sorted({row["level"] for row in before.values()} - {row["level"] for row in rows})
    if missing:
        print(f"not compared, for this machine lacks them: {', '.join(missing)}")
    changed = list(compare(rows, before))
    for sentence in changed:
        print(sentence, file=sys.stderr)
    if changed:
        print(f"more than {MOST:.0%} from {RECORD.name}: mend it, or say why and record it anew by `make counts`", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
