#!/usr/bin/env python3
"""Files that bitnet.cpp's own programs make. `bitnet_cpp.py BITNET MODEL CHECKOUT [LLAMA_QUANTIZE]`: the command, the embedded model's folder,
a checkout of microsoft/BitNet with its submodule 3rdparty/llama.cpp, and the llama-quantize built from it. Not part of interop.sh, which has
nothing to build that from. Needs what requirements.txt names, and sentencepiece, which the converter imports.

1. Its converter (`utils/convert-hf-to-gguf-bitnet.py`) packs the model as TL1 and TL2. What is changed of it: the weights are ternary
   already and not quantised once more, the vocabulary is a byte-level BPE, and kernel_config.ini names the model's shapes.
2. Its llama-quantize makes I2_S of our F16 file, and of the converter's F32 file.

`bitnet logits` gives the folder's logits for each, to the bit; a flipped byte in a tensor changes them, or is refused. Prints CRC-32 of the tensors as
engine/tests/data/gguf/written_by_others.json holds them.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile

BITNET, MODEL, CHECKOUT = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
QUANTIZE = sys.argv[4] if len(sys.argv) > 4 else None
sys.path[:0] = [str(CHECKOUT / "3rdparty/llama.cpp/gguf-py"), str(CHECKOUT / "utils")]

import gguf  # bitnet.cpp's
import numpy as np
import torch
from safetensors.torch import save_file

from digests import digests, starts
from gguf_package import LINEAR, NORM, Folder

TOKENS = "4094,1,2,3,4,5,6,7"
# What `bitnet convert` takes for shapes that no preset names. Rows of a block: 256 or 128. Columns of a block (bk):
COLUMNS = {"tl1": 128, "tl2": 192}
# What the checkpoints that bitnet.cpp was made for call their sub-norms.
SUB_NORM = {"attn_sub_norm": "self_attn.inner_attn_ln", "ffn_sub_norm": "mlp.ffn_layernorm"}


def converter():
    path = CHECKOUT / "utils/convert-hf-to-gguf-bitnet.py"
    spec = importlib.util.spec_from_file_location("converter", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.args = argparse.Namespace(quant_embd=False)

    class Ternary(module.BitnetModel):
        def set_vocab(self):
            self._set_vocab_gpt2()

        def get_vocab_base_pre(self, tokenizer):
            return "gpt-2"

        def weight_quant(self, weight):
            return weight

    return Ternary


def dense(folder, path):
    """The model with weights as floats, as the converter reads it."""
    names = {f"{k}.weight": f"{v}.weight" for k, v in {**LINEAR, **NORM, **SUB_NORM}.items()}
    tensors = {}
    for name, values in folder.tensors.items():
        block = name.split(".", 2)
        theirs = f"model.layers.{block[1]}.{names[block[2]]}" if block[0] == "blk" else {
            "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
        tensors[theirs] = torch.from_numpy(np.ascontiguousarray(values))
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"]:
        (path / name).write_bytes((MODEL / name).read_bytes())


def kernel_config(folder, kind):
    shapes = sorted({folder.tensors[name].shape for name in folder.scales})
    lines = []
    for number, (rows, columns) in enumerate(shapes):
        block = 128 if rows % 256 else 256
        values = zip(["m", "k", "bm", "bk", "bmm"], [rows, columns, block, COLUMNS[kind], 32])
        lines += [f"[Kernels_{number}]", *(f"{key} = {value}" for key, value in values), ""]
    path = pathlib.Path("include/kernel_config.ini")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return path


def logits(path, *more):
    out = pathlib.Path("logits.safetensors")
    command = [BITNET, "logits", "--model", path, "--tokens", TOKENS, "--out", out, *more]
    done = subprocess.run(command, env={**os.environ, "RUST_LOG": "error"}, stderr=subprocess.PIPE, text=True)
    return out.read_bytes() if done.returncode == 0 else done.stderr


def check(path, expected, *more):
    # Architecture `bitnet` says nothing of the activation in a file that others wrote.
    more = ["--activation", "relu2", *more]
    ours = logits(path, *more)
    assert ours == expected, f"{path}: {ours if isinstance(ours, str) else 'other logits'}"
    changed = bytearray(path.read_bytes())
    changed[starts(changed)["blk.0.attn_q.weight"][0]] ^= 0x15
    broken = pathlib.Path("broken.gguf")
    broken.write_bytes(changed)
    assert logits(broken, *more) != expected, f"{path}: a flipped byte changed nothing"
    print(f"written by bitnet.cpp: {path}, the logits the same", file=sys.stderr)


def main():
    folder = Folder(MODEL)
    made = {}
    ternary = converter()
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        os.chdir(scratch)
        expected = logits(MODEL)
        dense(folder, pathlib.Path("dense"))
        for kind, ftype in [("f32", "F32"), ("tl1", "TL1"), ("tl2", "TL2")]:
            out = pathlib.Path(f"{kind}.gguf")
            config = ["--kernel-config", kernel_config(folder, kind)] if kind in COLUMNS else []
            model = ternary(pathlib.Path("dense"), gguf.GGMLQuantizationType[ftype], out, False, False)
            model.set_gguf_parameters()
            model.set_vocab()
            model.write()
            if config:
                check(out, expected, *config)
                made[ftype] = digests(out, ftype)
        if QUANTIZE:
            subprocess.run([BITNET, "convert", MODEL, "ours.gguf", "--to", "gguf-f16", "--architecture", "bitnet", "--head", "f16"], check=True)
            for source, embedding in [("ours", "f16"), ("f32", "f32")]:
                out = pathlib.Path(f"{source}-i2_s.gguf")
                command = [QUANTIZE, "--token-embedding-type", embedding, f"{source}.gguf", out, "I2_S", "1"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                same = expected if embedding == "f32" else logits("ours.gguf", "--activation", "relu2")
                check(out, same)
                made["I2_S"] = digests(out, "I2_S")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
