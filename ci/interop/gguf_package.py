#!/usr/bin/env python3
"""The PyPI package `gguf` against this engine, both ways. `gguf_package.py BITNET MODEL`: the command and the embedded model's folder.

1. Files that `bitnet convert` writes: the package's reader finds the metadata, tokens and merges of the folder, and its quants module
   gives the folder's weights for every tensor (and the very bytes, for TQ1_0, TQ2_0 and Q8_0).
2. Files that the package's writer and quantisers make: `bitnet logits` gives the folder's bytes for each.
"""
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM = {
    "attn_norm": "input_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
FILE_TYPE = {Type.F32: 0, Type.F16: 1, Type.BF16: 32, Type.TQ1_0: 36, Type.TQ2_0: 37}


class Folder:
    """A packed folder: config, tokenizer, and dense f32 tensors by GGUF name."""

    def __init__(self, path):
        self.config = json.loads((path / "config.json").read_text())
        self.tokenizer = json.loads((path / "tokenizer.json").read_text())
        raw = (path / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.table, self.data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
        self.scales, self.tensors = {}, {}
        self.tensors["token_embd.weight"] = self.stored("model.embed_tokens.weight")
        self.tensors["output_norm.weight"] = self.stored("model.norm.weight")
        for layer in range(self.config["num_hidden_layers"]):
            for gguf_name, name in NORM.items():
                self.tensors[f"blk.{layer}.{gguf_name}.weight"] = self.stored(f"model.layers.{layer}.{name}.weight")
            for gguf_name, name in LINEAR.items():
                packed = self.stored(f"model.layers.{layer}.{name}.weight")
                trits = np.concatenate([(packed >> (2 * i) & 3).astype(np.float32) - 1 for i in range(4)])
                scale = self.stored(f"model.layers.{layer}.{name}.weight_scale")[0]
                key = f"blk.{layer}.{gguf_name}.weight"
                self.scales[key], self.tensors[key] = scale, trits * scale

    def stored(self, name):
        entry = self.table[name]
        raw = self.data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "U8":
            return np.frombuffer(raw, np.uint8).reshape(entry["shape"])
        assert entry["dtype"] == "BF16", name
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])

    def tokens(self):
        tokens = {i: t for t, i in self.tokenizer["model"]["vocab"].items()}
        tokens |= {t["id"]: t["content"] for t in self.tokenizer["added_tokens"]}
        return [tokens[i] for i in range(self.config["vocab_size"])]

    def merges(self):
        return [" ".join(merge) for merge in self.tokenizer["model"]["merges"]]


def check_read(folder, path):
    """A file of ours, read by the package."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    arch = keys["general.architecture"]
    for key, name in {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "context_length": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }.items():
        assert keys[f"{arch}.{key}"] == folder.config[name], key
    assert keys["tokenizer.ggml.tokens"] == folder.tokens()
    assert keys["tokenizer.ggml.merges"] == folder.merges()
    assert {t.name for t in reader.tensors} == set(folder.tensors)
    worst = 0.0
    for tensor in reader.tensors:
        expected = folder.tensors[tensor.name]
        values = quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if tensor.tensor_type in (Type.TQ1_0, Type.TQ2_0, Type.Q8_0):
            assert tensor.data.tobytes() == quants.quantize(expected, tensor.tensor_type).tobytes(), tensor.name
        if tensor.tensor_type in (Type.Q8_0, Type.Q6_K):
            worst = max(worst, float(np.abs(values - expected).max() / np.abs(expected).max()))
        else:
            assert np.array_equal(values, expected), tensor.name
    assert worst < 0.03, worst
    return len(reader.tensors)


def write(folder, path, ty, scales=False, alignment=None):
    """A file of the package's writer, with trits times scale or with the scales beside."""
    c, w = folder.config, gguf.GGUFWriter(path, "bitnet")
    if alignment:
        w.add_custom_alignment(alignment)
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    w.add_rope_scaling_factor(1.0)
    w.add_file_type(FILE_TYPE[ty])
    special = {t["id"] for t in folder.tokenizer["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("llama-bpe")
    w.add_token_list(folder.tokens())
    w.add_token_types([3 if i in special else 1 for i in range(c["vocab_size"])])
    w.add_token_merges(folder.merges())
    w.add_bos_token_id(c["bos_token_id"])
    w.add_eos_token_id(c["eos_token_id"])
    for name, values in folder.tensors.items():
        kind = Type.BF16 if name == "token_embd.weight" else ty if name in folder.scales else Type.F32
        if scales and name in folder.scales:
            w.add_tensor(name.replace(".weight", ".scale"), np.array([folder.scales[name]], np.float32))
            values = values / folder.scales[name]
        if kind == Type.F32:
            w.add_tensor(name, np.ascontiguousarray(values))
        else:
            w.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    bitnet, model = sys.argv[1], pathlib.Path(sys.argv[2])
    folder = Folder(model)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)

        def logits(path):
            out = scratch / "logits.safetensors"
            tokens = "4094,1,2,3,4,5,6,7;7,6,5,4,3,2,1,0"
            subprocess.run([bitnet, "logits", "--model", path, "--tokens", tokens, "--out", out], check=True, env={"RUST_LOG": "error"})
            return out.read_bytes()

        expected = logits(model)
        for target, head in [("tq1_0", None), ("tq2_0", None), ("f16", None), ("tq2_0", "q8_0"), ("tq1_0", "q6_k"), ("f16", "f16")]:
            path = scratch / f"{target}-{head}.gguf"
            more = ["--head", head] if head else []
            subprocess.run([bitnet, "convert", model, path, "--to", f"gguf-{target}", *more], check=True)
            if head == "f16":
                # f16 rounds the embedding's smallest values.
                gguf.GGUFReader(path)
                print(f"read {path.name}")
                continue
            print(f"read {path.name}: {check_read(folder, path)} tensors")
            assert head or logits(path) == expected, path
        for ty in FILE_TYPE:
            for scales, alignment in [(False, None), (True, 128)]:
                path = scratch / f"theirs-{ty.name}-{scales}.gguf"
                write(folder, path, ty, scales, alignment)
                assert logits(path) == expected, path
                print(f"written {path.name}: the same logits")


if __name__ == "__main__":
    main()
