#!/usr/bin/env python3
"""llama.cpp, as PyPI's llama-cpp-python brings it, against this engine. `upstream.py BITNET MODEL`: the command and the embedded model's folder.

1. Files that `bitnet convert` writes load in llama.cpp, and its own code (`ggml_get_type_traits(..)->to_float`) makes of every tensor the
   folder's weights, to the bit. They run: finite logits, not all the same.
2. Files that llama.cpp's quantiser makes of our F16 file hold the bytes that ours hold in every ternary tensor, and `bitnet logits`
   gives the folder's logits for each.

Logits are not compared: llama.cpp runs architecture `bitnet` with SiLU, where the model was trained with squared ReLU.
"""
import ctypes
import os
import pathlib
import subprocess
import sys
import tempfile

import gguf
import llama_cpp as llama
import numpy as np

from gguf_package import Folder

TOKENS = [4094, 1, 2, 3, 4, 5, 6, 7]
FTYPE = {"tq1_0": 36, "tq2_0": 37}  # llama.h, enum llama_ftype
BF16 = 30  # ggml.h, enum ggml_type


class Traits(ctypes.Structure):
    """ggml.h, struct ggml_type_traits, up to what is used."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


def ggml():
    lib = pathlib.Path(llama.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(lib.glob("libggml-base.so*"))))
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


def dequantised(library, tensor, count):
    traits = library.ggml_get_type_traits(int(tensor.tensor_type)).contents
    data = np.ascontiguousarray(tensor.data)
    if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
        return data.reshape(-1).astype(np.float32)
    assert data.nbytes == count // traits.blck_size * traits.type_size, tensor.name
    out = np.empty(count, np.float32)
    traits.to_float(data.ctypes.data, out.ctypes.data, count)
    return out


def check_tensors(library, folder, path):
    tensors = gguf.GGUFReader(path).tensors
    assert {t.name for t in tensors} == set(folder.tensors)
    for tensor in tensors:
        expected = folder.tensors[tensor.name].reshape(-1)
        values = dequantised(library, tensor, expected.size)
        # Trit 0 may be a zero of either sign.
        assert np.array_equal(values, expected), f"{path.name}: {tensor.name}"
    return len(tensors)


def check_run(path):
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"{path}: llama.cpp does not load it"
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    context = llama.llama_init_from_model(model, params)
    ids = (llama.llama_token * len(TOKENS))(*TOKENS)
    assert llama.llama_decode(context, llama.llama_batch_get_one(ids, len(TOKENS))) == 0, path
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(vocabulary,))
    assert np.isfinite(logits).all() and logits.min() < logits.max(), path
    llama.llama_free(context)
    llama.llama_model_free(model)
    return vocabulary


def main():
    bitnet, model = sys.argv[1], pathlib.Path(sys.argv[2])
    folder, library = Folder(model), ggml()
    llama.llama_backend_init()
    # Its log is long; its errors are asserted on.
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)

        def logits(path):
            out = scratch / "logits.safetensors"
            tokens = ",".join(map(str, TOKENS))
            # Architecture `bitnet` says nothing of the activation in a file that others wrote.
            more = ["--activation", "relu2"] if path.suffix == ".gguf" else []
            command = [bitnet, "logits", "--model", path, "--tokens", tokens, "--out", out, *more]
            subprocess.run(command, check=True, env={**os.environ, "RUST_LOG": "error"})
            return out.read_bytes()

        expected = logits(model)
        for target in ["tq1_0", "tq2_0", "f16"]:
            path = scratch / f"ours-{target}.gguf"
            subprocess.run([bitnet, "convert", model, path, "--to", f"gguf-{target}", "--architecture", "bitnet"], check=True)
            tensors = check_tensors(library, folder, path)
            print(f"read by llama.cpp: {path.name}, {tensors} tensors the same, {check_run(path)} finite logits")
        for target, ftype in FTYPE.items():
            path = scratch / f"theirs-{target}.gguf"
            params = llama.llama_model_quantize_default_params()
            params.ftype, params.token_embedding_type, params.output_tensor_type = ftype, BF16, BF16
            source = str(scratch / "ours-f16.gguf").encode()
            assert llama.llama_model_quantize(source, str(path).encode(), ctypes.byref(params)) == 0, path
            ours = {t.name: t.data.tobytes() for t in gguf.GGUFReader(scratch / f"ours-{target}.gguf").tensors}
            theirs = {t.name: t.data.tobytes() for t in gguf.GGUFReader(path).tensors}
            same = [name for name in folder.scales if ours[name] == theirs[name]]
            assert len(same) == len(folder.scales), f"{path.name}: {set(folder.scales) - set(same)} differ"
            assert logits(path) == expected, f"{path.name}: other logits"
            print(f"written by llama.cpp: {path.name}, {len(same)} ternary tensors and the logits the same")


if __name__ == "__main__":
    main()
