#!/usr/bin/env python3
"""Hugging Face transformers reads the folders that `bitnet convert` writes. `hf_folder.py BITNET MODEL...`: the command and packed folders.

For each model, a folder written from it and one written from a GGUF file written from it load in transformers and give the logits that the
model itself gives there, to the bit; a changed scale does not. Where there is a tokenizer, the written one gives the same ids.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # @torch.compile helpers run eagerly
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file

# One thread sums in one order.
torch.set_num_threads(1)
torch.set_grad_enabled(False)

TEXTS = ["Once upon a time", "  two  spaces\n\n\ttab", "naïve café, 東京 ☕ 1234567890", "<|begin_of_text|>a<|end_of_text|>"]


def logits(folder):
    """In float32. `from_pretrained(dtype=float32)` leaves embeddings and norms in the type of the file, so an exact copy is loaded."""
    with tempfile.TemporaryDirectory() as copy:
        exact = {k: v if v.dtype == torch.uint8 else v.float() for k, v in load_file(folder / "model.safetensors").items()}
        save_file(exact, os.path.join(copy, "model.safetensors"), metadata={"format": "pt"})
        pathlib.Path(copy, "config.json").write_text((folder / "config.json").read_text())
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            copy, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not set(report["missing_keys"]) - tied and not report["unexpected_keys"], report
    ids = torch.arange(24).reshape(2, 12) * 7 % model.config.vocab_size
    return model.eval()(input_ids=ids, use_cache=False).logits


def same_ids(ours, theirs):
    if not (theirs / "tokenizer.json").exists():
        return 0
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (ours, theirs))
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    return len(TEXTS)


def main():
    bitnet, models = sys.argv[1], map(pathlib.Path, sys.argv[2:])
    for model in models:
        expected = logits(model)
        assert torch.isfinite(expected).all()
        with tempfile.TemporaryDirectory() as scratch:
            scratch = pathlib.Path(scratch)

            def convert(source, name, target):
                subprocess.run([bitnet, "convert", source, scratch / name, "--to", target], check=True)
                return scratch / name

            written = [convert(model, "folder", "hf-packed")]
            written.append(convert(convert(model, "file.gguf", "gguf-i2_s"), "from-file", "hf-packed"))
            for folder in written:
                assert torch.equal(logits(folder), expected), f"{model.name}: {folder.name} gives other logits"
                texts = same_ids(folder, model)
            # The comparison sees one scale of one layer.
            tensors = load_file(folder / "model.safetensors")
            tensors["model.layers.0.mlp.up_proj.weight_scale"] *= 2
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            assert not torch.equal(logits(folder), expected), "a doubled scale changed nothing"
            print(f"read by transformers: {model.name}, {len(written)} folders, {expected.numel()} logits and {texts} texts the same")


if __name__ == "__main__":
    main()
