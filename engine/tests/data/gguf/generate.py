#!/usr/bin/env python3
"""Reference values of quantised float types, from the PyPI package `gguf` (0.19.0, numpy).

`python generate.py` writes a .bin file beside it for each type: blocks of the type, then the f32 values that the package's
`quants.dequantize` gives for them. The bytes of a block are arbitrary but for its f16 scale.
"""
import pathlib

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

BLOCKS = 6
# Type, bytes of a block, where its f16 scale lies.
TYPES = [(Type.Q4_0, 18, 0), (Type.Q8_0, 34, 0), (Type.Q6_K, 210, 208)]

for ty, size, scale in TYPES:
    e = np.arange(BLOCKS * size, dtype=np.uint64)
    data = ((e * 2654435761 % (1 << 32)) >> 16).astype(np.uint8).reshape(BLOCKS, size)
    data[:, scale : scale + 2] = np.array([0.5, -0.0123, 3.0e-5, 0.0, 1.75, 0.3333], "<f2").view(np.uint8).reshape(BLOCKS, 2)
    values = quants.dequantize(data, ty).astype("<f4")
    path = pathlib.Path(__file__).parent / f"{ty.name.lower()}.bin"
    path.write_bytes(data.tobytes() + values.tobytes())
