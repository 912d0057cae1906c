#!/usr/bin/env python3
"""Reference bytes of the ternary formats, from an implementation in numpy that shares nothing with this crate.

`python generate.py` writes the .bin files beside it. The pack functions were compared byte for byte with what transformers (HF),
bitnet.cpp (I2_S, TL1, TL2), llama.cpp (TQ1_0, TQ2_0) and ik_llama.cpp (IQ1_BN, IQ2_BN) write.
"""
import pathlib
import struct

import numpy as np


def pack_hf(t):
    """uint8 [ceil(rows/4), cols]; byte[r,c] bits 2i..2i+1 = t[i*R + r, c] + 1, R = ceil(rows/4)"""
    t = np.asarray(t, np.int8); R = -(-t.shape[0] // 4)
    out = np.zeros((R,) + t.shape[1:], np.uint8)
    for i in range(4):
        s = (t[i * R:(i + 1) * R] + 1).astype(np.uint8)
        out[:len(s)] |= s << (2 * i)
    return out

def _i2s_pack(t, scale, blk):
    q = (np.asarray(t, np.int8).reshape(-1) + 1).astype(np.uint8)      # flat, row-major, blocks run across rows
    assert q.size % blk == 0, "n must be a multiple of %d" % blk
    g = q.reshape(-1, 4, blk // 4)
    body = ((g[:, 0] << 6) | (g[:, 1] << 4) | (g[:, 2] << 2) | g[:, 3]).astype(np.uint8).tobytes()
    return body + struct.pack("<f", scale) + bytes(28)                 # n/4 bytes + 32-byte tail

def _grid(*dims): return np.meshgrid(*[np.arange(d) for d in dims], indexing="ij", sparse=True)

def _tl1_order(M, K, BM, BY, bm):
    """Loops, outermost first: row tile tm, column tile tk, row block rb, column block jb, row group rg, pair couple jq, row r.
    One byte per step, p = 0 high nibble, p = 1 low nibble.  Returns m*(K/2)+j per nibble, shape [M*K/64, 16, 2]."""
    by = 256 // bm
    tm, tk, rb, jb, rg, jq, r, p = _grid(M // BM, K // BY, BM // bm, BY // by, bm // 16, by // 4, 16, 2)
    m = tm * BM + rb * bm + rg * 16 + r
    j = tk * (BY // 2) + jb * (by // 2) + jq * 2 + p
    return (m * (K // 2) + j).reshape(M * K // 64, 16, 2)

def pack_tl1(t, BM, BY, bm):
    """M*K/4 bytes; the scale travels as a separate f32 tensor '<name>_scale' [1]"""
    M, K = t.shape; p = np.asarray(t, np.int64).reshape(M, K // 2, 2)
    c = (3 * p[..., 0] + p[..., 1] + 4).astype(np.uint8).reshape(-1)    # 0..8
    o = _tl1_order(M, K, BM, BY, bm)
    return ((c[o[..., 0]] << 4) | c[o[..., 1]]).astype(np.uint8).tobytes()

def _tl2_nib(M, K, BM, BY, bm, by, g):
    """nibbles of groups of g columns (g=3: by=6; g=2: by=4, BY=32): tm, tk, 32-row block rb, jb, eight-row group q (rows 0-7, 16-23, 8-15, 24-31), row r;
    p = 0 high nibble.  Returns m*(K/g)+j, shape [M*K/(32*by), 32, 2]"""
    tm, tk, rb, jb, q, r, p = _grid(M // BM, K // BY, BM // bm, BY // by, 4, 8, 2)
    m = tm * BM + rb * bm + 8 * np.array([0, 2, 1, 3])[q] + r
    return (m * (K // g) + tk * (BY // g) + jb * 2 + p).reshape(-1, bm, 2)

def _tl2_sign(M, K, BM, BY, bm, by):
    """per 32 rows x 8 triples: 16 u16; word h, bit 15-i: row 16*(i%2)+h, triple i//2.  Shape [n, 16 (h), 16 (i)]"""
    tm, tk, rb, jb, h, i = _grid(M // BM, K // BY, BM // bm, BY // 24, 16, 16)
    return ((tm * BM + rb * bm + 16 * (i % 2) + h) * (K // 3) + tk * (BY // 3) + jb * 8 + i // 2).reshape(-1, 16, 16)

def tl2_sizes(M, K, BY):
    K3 = K - K % BY; K2 = K - K3
    n = (K - 256) * M // 3 * 5 // 8 + 256 * M // 2 * 4 // 8                     # what ggml_nbytes reserves, before 32-padding
    return K3, K2, M * K3 // 6, M * K3 // 24, M * K2 // 4, n

def pack_tl2(t, BM, BY, bm=32):
    """[3-group nibbles M*K3/6][sign u16 LE M*K3/24][2-group nibbles M*K2/4][zero pad]; scale in '<name>_scale'"""
    M, K = t.shape; assert bm == 32; by = 192 // bm; t = np.asarray(t, np.int64)
    K3, K2, n3, ns, n2, tot = tl2_sizes(M, K, BY)
    g = t[:, :K3].reshape(M, K3 // 3, 3); v = 9 * g[..., 0] + 3 * g[..., 1] + g[..., 2]
    c = np.abs(v).astype(np.uint8).reshape(-1); s = (v < 0).astype(np.uint16).reshape(-1)
    o = _tl2_nib(M, K3, BM, BY, bm, by, 3); out = ((c[o[..., 0]] << 4) | c[o[..., 1]]).astype(np.uint8).tobytes()
    o = _tl2_sign(M, K3, BM, BY, bm, by)
    out += (s[o] << np.arange(15, -1, -1, dtype=np.uint16)).sum(-1).astype("<u2").tobytes()
    if K2:
        g = t[:, K3:].reshape(M, K2 // 2, 2); c = (3 * g[..., 0] + g[..., 1] + 4).astype(np.uint8).reshape(-1)
        o = _tl2_nib(M, K2, BM, 32, 32, 4, 2); out += ((c[o[..., 0]] << 4) | c[o[..., 1]]).astype(np.uint8).tobytes()
    assert len(out) <= tot, "shape not representable: body %d > reserved %d" % (len(out), tot)
    return out + bytes(tot - len(out))

P3 = np.array([81, 27, 9, 3, 1])

def pack_tq1_0(t, scale):
    q = (np.asarray(t, np.int64) + 1).reshape(-1, 256); d = np.full((len(q), 1), scale, "<f2").view(np.uint8)
    a = (q[:, :160].reshape(-1, 5, 32) * P3[:, None]).sum(1)                     # 32 bytes: element 32*k + j is trit k of byte j
    b = (q[:, 160:240].reshape(-1, 5, 16) * P3[:, None]).sum(1)                  # 16 bytes: element 160 + 16*k + j
    h = (q[:, 240:].reshape(-1, 4, 4) * P3[:4, None]).sum(1)                     #  4 bytes: element 240 + 4*k + j
    x = np.concatenate([a, b, h], 1); x = (x * 256 + 242) // 243
    return np.concatenate([x.astype(np.uint8), d], 1).tobytes()

def pack_tq2_0(t, scale):
    q = (np.asarray(t, np.int8) + 1).astype(np.uint8).reshape(-1, 2, 4, 32); d = np.full((len(q), 1), scale, "<f2").view(np.uint8)
    x = (q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)).reshape(-1, 64)   # LSB first, two halves of 128
    return np.concatenate([x, d], 1).tobytes()

def pack_iq2_bn(t, scale):
    """row = f32 scale + cols/64 * 16 bytes; byte j: elements j, 16+j, 32+j, 48+j LSB first"""
    q = (np.asarray(t, np.int8) + 1).astype(np.uint8); r, c = q.shape; g = q.reshape(r, c // 64, 4, 16)
    x = (g[:, :, 0] | (g[:, :, 1] << 2) | (g[:, :, 2] << 4) | (g[:, :, 3] << 6)).reshape(r, -1)
    return np.concatenate([np.full((r, 1), scale, "<f4").view(np.uint8), x], 1).tobytes()

W3 = np.array([1, 3, 9, 27, 81])

def pack_iq1_bn(t, scale):
    """row = f16 scale + cols/64 * 13 bytes: 12 bytes of 5 trits (columns 16g+5k .. +4), byte 12: the 16th column of each of the 4 groups"""
    q = (np.asarray(t, np.int64) + 1); r, c = q.shape; g = q.reshape(r, c // 64, 4, 16)
    a = (g[..., :15].reshape(r, c // 64, 12, 5) * W3).sum(-1); e = (g[..., 15] * W3[:4]).sum(-1, keepdims=True)
    x = (np.concatenate([a, e], -1) * 256 + 242) // 243
    return np.concatenate([np.full((r, 1), scale, "<f2").view(np.uint8), x.astype(np.uint8).reshape(r, -1)], 1).tobytes()


def pattern(r, c):
    e = np.arange(r * c, dtype=np.int64)
    return ((e * e + e // 3) % 3 - 1).astype(np.int8).reshape(r, c)


def hashed(r, c):
    e = np.arange(r * c, dtype=np.uint64)
    return (((e * 2654435761) % (1 << 32) >> 16) % 3).astype(np.int8).reshape(r, c) - 1


CASES = {
    "hf": [(8, 4), (64, 40)],
    "i2_s_x86": [(4, 128), (3, 640)],
    "i2_s_arm": [(4, 128), (3, 192)],
    "tq1_0": [(1, 256), (3, 512)],
    "tq2_0": [(1, 256), (3, 512)],
    "iq2_bn": [(1, 64), (4, 320)],
    "iq1_bn": [(1, 64), (4, 320)],
    "tl1_64_64_32": [(64, 64), (128, 192)],
    "tl1_128_128_64": [(128, 128), (256, 384)],
    "tl2_64_96": [(64, 512), (128, 576)],
    "tl2_32_192": [(32, 256), (64, 608)],
}
PACK = {
    "hf": lambda t, s: pack_hf(t).tobytes(),
    "i2_s_x86": lambda t, s: _i2s_pack(t, s, 128),
    "i2_s_arm": lambda t, s: _i2s_pack(t, s, 64),
    "tq1_0": pack_tq1_0,
    "tq2_0": pack_tq2_0,
    "iq2_bn": pack_iq2_bn,
    "iq1_bn": pack_iq1_bn,
    "tl1_64_64_32": lambda t, s: pack_tl1(t, 64, 64, 32),
    "tl1_128_128_64": lambda t, s: pack_tl1(t, 128, 128, 64),
    "tl2_64_96": lambda t, s: pack_tl2(t, 64, 96),
    "tl2_32_192": lambda t, s: pack_tl2(t, 32, 192),
}

if __name__ == "__main__":
    for name, shapes in CASES.items():
        for fill, shape in zip((pattern, hashed), shapes):
            path = pathlib.Path(__file__).parent / f"{name}_{shape[0]}x{shape[1]}.bin"
            path.write_bytes(PACK[name](fill(*shape), 0.5))
