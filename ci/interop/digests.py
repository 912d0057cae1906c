#!/usr/bin/env python3
"""CRC-32 of every ternary tensor of GGUF files, to hold the engine's writers to them. `digests.py NAME=FILE...` prints JSON.

engine/tests/data/gguf/written_by_others.json was made of the embedded model: its F16 file (`bitnet convert --to gguf-f16`) went through the
quantisers of llama.cpp (upstream.py), ik_llama.cpp (`llama-quantize`) and bitnet.cpp (bitnet_cpp.py, with its converter's TL1 and TL2).

The package `gguf` refuses the types of the other two families. So only the tables are read here: a tensor's bytes end where the next
one begins, padding and all. Those of I2_S end behind the scale, where its quantiser leaves 28 bytes as they happen to be; of TL1 and TL2
the last 32, with the scale, have no entry in the table of the converter's file and are left out.
"""
import json
import math
import pathlib
import struct
import sys
import zlib

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def starts(data):
    """Where each tensor begins in the file and how many values it has, by name."""
    at = 8

    def number(form):
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text():
        nonlocal at
        length = number("Q")
        at += length
        return data[at - length : at].decode()

    def value(kind):
        nonlocal at
        if kind == STRING:
            return text()
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            for _ in range(count):
                value(inner)
            return None
        at += SIZES[kind]
        return int.from_bytes(data[at - SIZES[kind] : at], "little")

    tensors, pairs = number("Q"), number("Q")
    metadata = {text(): value(number("I")) for _ in range(pairs)}
    offsets = {}
    for _ in range(tensors):
        name = text()
        values = math.prod(number("Q") for _ in range(number("I")))
        number("I")
        offsets[name] = number("Q"), values
    alignment = metadata.get("general.alignment", 32)
    start = -(-at // alignment) * alignment
    return {name: (start + offset, values) for name, (offset, values) in offsets.items()}


def digests(path, kind):
    data = pathlib.Path(path).read_bytes()
    tensors = starts(data)
    ends = sorted(offset for offset, _ in tensors.values())[1:] + [len(data)]
    found = {}
    for (name, (start, values)), end in zip(sorted(tensors.items(), key=lambda entry: entry[1]), ends):
        if name.startswith("blk.") and name.endswith(".weight") and "norm" not in name:
            end = {"I2_S": start + values // 4 + 4, "TL1": end - 32, "TL2": end - 32}.get(kind, end)
            found[name] = zlib.crc32(data[start:end])
    return found


if __name__ == "__main__":
    print(json.dumps({name: digests(path, name) for name, path in (pair.split("=", 1) for pair in sys.argv[1:])}, indent=1))
