#!/usr/bin/env python3
"""The second derivation of the golden logits: Hugging Face transformers on the CPU.

usage: python make_golden.py MODELS OUT [case ...]

MODELS holds one checkpoint folder per case (`golden export --out MODELS` writes them); prompts come from
../prompts.json. OUT/<case>/transformers.safetensors receives, for every prompt P of the case:

  P.input_ids                    i64 [B,T]
  P.{w1.58a8,fp32}.logits        f32 [B,T,V]
  P.{w1.58a8,fp32}.greedy        i64 [B,N]      N = 16, fewer where the context ends
  P.{w1.58a8,fp32}.greedy_margin f32 [B,N]      best minus second-best logit of each step
  P.w1.58a8.codes                i64 [B,T,L,4]  hash of the int8 codes of each quantised input (see `code_hash`)

and of the case's trace prompt `trace.{w1.58a8,fp32}.*`: the inside of layer 0, every layer's output, the final norm.

w1.58a8: AutoModelForCausalLM in float32, the forward pass of transformers untouched.
fp32:    the same model class with plain linear layers holding trit * scale, without activation quantisation, evaluated
         in float64 from end to end (norms, rotary embedding and softmax too), stored as float32.
"""
import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # @torch.compile helpers run eagerly
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM
from transformers.integrations import bitnet as bitlinear
from transformers.models.bitnet import modeling_bitnet as modeling

torch.set_num_threads(1)
torch.set_grad_enabled(False)

HERE = pathlib.Path(__file__).resolve().parent
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
# One of the projections that share an input stands for them: q for k and v, gate for up.
QUANTISED_INPUTS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
HASH_FACTOR = 0x100000001B3


class Checkpoint:
    """A checkpoint folder: configuration and all tensors."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            self.tensors.update(load_file(file))
        quantization = self.config["quantization_config"]
        self.online = quantization["quantization_mode"] == "online"
        self.multiplies = quantization.get("linear_class", "bitlinear") == "autobitlinear"
        self.layers = self.config["num_hidden_layers"]
        self.tied = self.config["tie_word_embeddings"]
        rope = self.config.get("rope_parameters") or self.config
        self.rope_theta = rope["rope_theta"]
        self.head_dim = self.config["hidden_size"] // self.config["num_attention_heads"]

    def is_projection(self, name):
        return any(name.endswith(p + ".weight") for p in PROJECTIONS)


def w158a8_model(checkpoint):
    """transformers' own model in float32.

    `from_pretrained(dtype=float32)` is honoured by the quantised layers only: embeddings and norms keep the file's type,
    and `.float()` is refused. So an exact float32 copy of the file is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        exact = {k: v if v.dtype == torch.uint8 else v.float() for k, v in checkpoint.tensors.items()}
        save_file(exact, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        pathlib.Path(folder, "config.json").write_text(json.dumps(checkpoint.config))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    check_w158a8(model, checkpoint)
    return model


def check_w158a8(model, checkpoint):
    """The model that transformers built is the checkpoint's, in float32, with the linear class that was asked for."""
    assert all(t.dtype in (torch.float32, torch.uint8) for t in list(model.parameters()) + list(model.buffers()))
    kind = bitlinear.AutoBitLinear if checkpoint.multiplies else bitlinear.BitLinear
    assert sum(type(m) is kind for m in model.modules()) == 7 * checkpoint.layers
    assert type(model.lm_head) is torch.nn.Linear
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == checkpoint.tied
    assert float(model.config.rope_parameters["rope_theta"]) == checkpoint.rope_theta
    for name, tensor in checkpoint.tensors.items():
        if not checkpoint.is_projection(name):
            continue
        module = model.get_submodule(name.removesuffix(".weight"))
        if checkpoint.online:
            assert module.online_quant and torch.equal(module.weight, tensor.float()), name
        else:
            weight = module.weight if checkpoint.multiplies else bitlinear.unpack_weights(module.weight, dtype=torch.float32)
            assert torch.equal(weight, bitlinear.unpack_weights(tensor, dtype=torch.float32)), name
            assert torch.equal(module.weight_scale, checkpoint.tensors[name + "_scale"].float()), name


def dense_weight(checkpoint, name, tensor):
    """trit * scale in float64; the scale of a master checkpoint is its mean absolute weight in float32."""
    if checkpoint.online:
        inverse = 1.0 / tensor.float().abs().mean().clamp(min=1e-5)
        return (tensor.float() * inverse).round().clamp(-1, 1).double() * (1.0 / inverse).double()
    trits = bitlinear.unpack_weights(tensor, dtype=torch.float64)
    scale = checkpoint.tensors[name + "_scale"].double()
    return trits * scale if checkpoint.multiplies else trits / scale


class Norm64(torch.nn.Module):
    """RMSNorm without the detour through float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight.double()
        self.eps = norm.variance_epsilon

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Rotary64(torch.nn.Module):
    """Angles in float64."""

    def __init__(self, theta, head_dim):
        super().__init__()
        self.inverse = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def attention64(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """Eager attention with a softmax in the type of its input."""
    key = modeling.repeat_kv(key, module.num_key_value_groups)
    value = modeling.repeat_kv(value, module.num_key_value_groups)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if mask is not None:
        weights = weights + mask
    weights = torch.softmax(weights, -1)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class float64_attention:
    """Puts `attention64` in the place of the eager attention of transformers."""

    def __enter__(self):
        self.original = modeling.eager_attention_forward
        modeling.eager_attention_forward = attention64

    def __exit__(self, *_):
        modeling.eager_attention_forward = self.original


def fp32_model(checkpoint):
    config = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "torch_dtype")}
    config = BitNetConfig(**config)
    config._attn_implementation = "eager"
    model = BitNetForCausalLM(config).double().eval()
    weights = {}
    for name, tensor in checkpoint.tensors.items():
        if checkpoint.is_projection(name):
            weights[name] = dense_weight(checkpoint, name, tensor)
        elif not name.endswith("weight_scale"):
            weights[name] = tensor.double()
    if checkpoint.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, modeling.BitNetRMSNorm):
                setattr(module, name, Norm64(child))
    model.model.rotary_emb = Rotary64(checkpoint.rope_theta, checkpoint.head_dim)
    return model


def greedy(model, ids, steps):
    """Greedy tokens i64 [B,steps] and their margins f32, end-of-text tokens treated as any other."""
    if steps == 0:
        return torch.zeros(len(ids), 0, dtype=torch.int64), torch.zeros(len(ids), 0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
                         use_cache=True, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True)
    best = torch.stack(out.logits, 1).float().topk(2, -1).values
    return out.sequences[:, ids.shape[1]:].contiguous(), (best[..., 0] - best[..., 1]).contiguous()


def code_hash(x):
    """Hash of the int8 codes of each row of x [..., n]: sum over j of (q_j + 129) * HASH_FACTOR^j, modulo 2^64.

    The codes are computed with the float operations of transformers' own quantisers.
    """
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
    codes = (x * scale).round().clamp(-128, 127).to(torch.int64)
    powers = [1]
    for _ in range(x.shape[-1] - 1):
        powers.append(powers[-1] * HASH_FACTOR % 2**64)
    powers = torch.tensor([p - 2**64 if p >= 2**63 else p for p in powers])
    return ((codes + 129) * powers).sum(-1)


class Hooks:
    """Forward hooks that are taken off again."""

    def __enter__(self):
        self.handles = []
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def on(self, module, call):
        self.handles.append(module.register_forward_hook(call))


def logits_and_codes(model, ids, layers):
    codes = {}
    with Hooks() as hooks:
        for layer in range(layers):
            for which, name in enumerate(QUANTISED_INPUTS):
                def keep(_, inputs, __, key=(layer, which)):
                    codes[key] = code_hash(inputs[0])
                hooks.on(model.model.layers[layer].get_submodule(name), keep)
        logits = model(ids, use_cache=False).logits
    by_layer = [torch.stack([codes[layer, i] for i in range(4)], -1) for layer in range(layers)]
    return logits, torch.stack(by_layer, -2).contiguous()


def trace(model, ids):
    """The activations inside one forward pass, f32 [B,T,n] each."""
    seen = {}
    with Hooks() as hooks:
        def output(name):
            def keep(_, __, result):
                result = result[0] if isinstance(result, tuple) else result
                seen[name] = result.detach().float().clone().contiguous()
            return keep

        def first_input(name):
            def keep(_, inputs, __):
                seen[name] = inputs[0].detach().float().clone().contiguous()
            return keep

        hooks.on(model.model.embed_tokens, output("embed"))
        for i, layer in enumerate(model.model.layers):
            hooks.on(layer, output(f"layer{i}.out"))
        layer, attention, mlp = model.model.layers[0], model.model.layers[0].self_attn, model.model.layers[0].mlp
        for name, module in [("input_norm", layer.input_layernorm), ("q", attention.q_proj), ("k", attention.k_proj),
                             ("v", attention.v_proj), ("attn_sub_norm", attention.attn_sub_norm), ("o", attention.o_proj),
                             ("post_attn_norm", layer.post_attention_layernorm), ("gate", mlp.gate_proj), ("up", mlp.up_proj),
                             ("ffn_sub_norm", mlp.ffn_sub_norm), ("down", mlp.down_proj)]:
            hooks.on(module, output(f"layer0.{name}"))
        hooks.on(attention.attn_sub_norm, first_input("layer0.attn_out"))
        hooks.on(mlp.ffn_sub_norm, first_input("layer0.ffn_act"))
        hooks.on(model.model.norm, output("final_norm"))
        model(ids, use_cache=False)
    return seen


def check_text(folder, prompts):
    """The token ids of prompts that have a text are what the model's tokenizer makes of it."""
    from tokenizers import Tokenizer

    for prompt in prompts:
        if "text" in prompt:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            assert [tokenizer.encode(text).ids for text in prompt["text"]] == prompt["input_ids"], prompt["name"]


def make(case, new_tokens, folder):
    checkpoint = Checkpoint(folder)
    check_text(folder, case["prompts"])
    quantised, dense = w158a8_model(checkpoint), fp32_model(checkpoint)
    out = {}
    for prompt in case["prompts"]:
        name, ids = prompt["name"], torch.tensor(prompt["input_ids"])
        steps = min(new_tokens, checkpoint.config["max_position_embeddings"] - ids.shape[1])
        out[f"{name}.input_ids"] = ids
        logits, out[f"{name}.w1.58a8.codes"] = logits_and_codes(quantised, ids, checkpoint.layers)
        out[f"{name}.w1.58a8.logits"] = logits.float().contiguous()
        out[f"{name}.w1.58a8.greedy"], out[f"{name}.w1.58a8.greedy_margin"] = greedy(quantised, ids, steps)
        with float64_attention():
            logits = dense(ids, use_cache=False).logits
            assert logits.dtype == torch.float64
            out[f"{name}.fp32.logits"] = logits.float().contiguous()
            out[f"{name}.fp32.greedy"], out[f"{name}.fp32.greedy_margin"] = greedy(dense, ids, steps)
        if name == case["trace"]:
            traces = {"w1.58a8": trace(quantised, ids)}
            with float64_attention():
                traces["fp32"] = trace(dense, ids)
            out.update({f"trace.{s}.{k}": v for s, t in traces.items() for k, v in t.items()})
    return out


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    models, target, names = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]
    prompts = json.loads((HERE.parent / "prompts.json").read_text())
    unknown = set(names) - {case["case"] for case in prompts["cases"]}
    if unknown:
        sys.exit(f"no such case in prompts.json: {', '.join(sorted(unknown))}")
    for case in prompts["cases"]:
        name = case["case"]
        if names and name not in names:
            continue
        tensors = make(case, prompts["new_tokens"], models / name)
        (target / name).mkdir(parents=True, exist_ok=True)
        made_by = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
        partial = target / name / "transformers.safetensors.partial"
        save_file(tensors, partial, metadata={"made_by": made_by})
        partial.chmod(0o644)
        partial.replace(target / name / "transformers.safetensors")
        print(f"{name}: {len(case['prompts'])} prompts", flush=True)


if __name__ == "__main__":
    main()
