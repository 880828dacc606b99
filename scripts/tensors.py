#!/usr/bin/env python3
"""Small jobs on safetensors files for the demo, without packages.

tensors.py take IN OUT NAME=NEW...      copies tensors of IN into OUT under new names
tensors.py compare A NAME B NAME BOUND  prints ||a - b|| / ||b|| and fails when it is beyond BOUND
"""

import json
import math
import pathlib
import struct
import sys


def read(path):
    """Header entry and bytes of each tensor of a safetensors file."""
    data = pathlib.Path(path).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    body = data[8 + size:]
    return {name: (entry, body[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def values(entry, data):
    """Values of an F32, F16 or BF16 tensor as floats."""
    if entry["dtype"] == "BF16":
        return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]
    letter = {"F32": "f", "F16": "e"}[entry["dtype"]]
    return [value for (value,) in struct.iter_unpack("<" + letter, data)]


def take(source, target, *names):
    tensors, header, body = read(source), {}, b""
    for name, new in (pair.split("=") for pair in names):
        entry, data = tensors[name]
        header[new] = {**entry, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(target).write_bytes(struct.pack("<Q", len(text)) + text + body)


def compare(path_a, name_a, path_b, name_b, bound):
    a, b = values(*read(path_a)[name_a]), values(*read(path_b)[name_b])
    if len(a) != len(b):
        sys.exit(f"tensors.py: {len(a)} values against {len(b)}")
    error = math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / sum(y * y for y in b))
    print(f"{error:.2e} (bound {float(bound):.0e})")
    if not error <= float(bound):
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("take", "compare"):
        sys.exit(__doc__)
    {"take": take, "compare": compare}[sys.argv[1]](*sys.argv[2:])
