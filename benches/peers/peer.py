"""Times llama.cpp through llama-cpp-python's low-level API as `bitnet bench` times our engine, and prints one JSON object."""

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time

import llama_cpp as llama
import numpy as np

ERRORS = 4  # ggml's log level


@llama.llama_log_callback
def log(level, text, _data):
    if level == ERRORS:
        sys.stderr.write(text.decode(errors="replace"))


class Peer:
    def __init__(self, path, threads, positions, longest):
        llama.llama_log_set(log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self.model:
            sys.exit(f"{path}: llama.cpp does not load it")
        params = llama.llama_context_default_params()
        params.n_ctx = positions
        params.n_batch = longest
        params.n_threads = params.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"{path}: no context of {positions} positions")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def rewind(self, depth):
        """Forgets the positions from `depth` on."""
        if not llama.llama_memory_seq_rm(llama.llama_get_memory(self.context), 0, depth, -1):
            sys.exit(f"llama.cpp does not forget the positions from {depth} on")

    def feed(self, tokens):
        """The logits after the last of `tokens`, valid until the next call."""
        ids = (llama.llama_token * len(tokens))(*tokens)
        status = llama.llama_decode(self.context, llama.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            sys.exit(f"llama_decode: {status}")
        # This also waits for the computation.
        logits = llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.vocabulary,))


def verify(peer, depth, prompt):
    """A figure counts only if something was computed; this also warms the engine up."""
    peer.rewind(depth)
    first = peer.feed(prompt).copy()
    peer.rewind(depth)
    second = peer.feed(prompt).copy()
    if not np.isfinite(first).all() or first.min() == first.max():
        sys.exit("the logits are not finite, or all the same")
    if not np.array_equal(first, second):
        sys.exit("two runs of the prompt disagree")
    # An engine that skips part of a long batch is fast, and caught here. Its kernels round differently for one token, so nearly is enough.
    if len(prompt) > 1:
        peer.rewind(depth)
        peer.feed(prompt[:-1])
        stepped = peer.feed(prompt[-1:])
        likeness = float(np.corrcoef(first, stepped)[0, 1])
        if not likeness > 0.99:
            sys.exit(f"prefill and decode disagree: correlation {likeness:.4f}")


def measure(peer, depth, prompt, tg):
    peer.rewind(depth)
    start = time.perf_counter()
    token = int(peer.feed(prompt).argmax())
    middle = time.perf_counter()
    tokens = []
    for _ in range(tg):
        tokens.append(token)
        token = int(peer.feed([token]).argmax())
    end = time.perf_counter()
    return middle - start, end - middle, tokens


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--model", required=True)
    args.add_argument("--pp", type=int, default=512)
    args.add_argument("--tg", type=int, default=64)
    args.add_argument("--depth", type=int, default=0)
    args.add_argument("--threads", type=int, required=True)
    args.add_argument("--runs", type=int, default=3)
    args = args.parse_args()

    peer = Peer(args.model, args.threads, args.depth + args.pp + args.tg, max(args.pp, 512))
    # The tokens of `bitnet bench`.
    tokens = [(i * 7919 + 17) % peer.vocabulary for i in range(args.depth + args.pp)]
    before, prompt = tokens[:args.depth], tokens[args.depth:]
    for start in range(0, args.depth, 512):
        peer.feed(before[start:start + 512])
    verify(peer, args.depth, prompt)
    runs = [measure(peer, args.depth, prompt, args.tg) for _ in range(args.runs)]
    if any(tokens != runs[0][2] for _, _, tokens in runs):
        sys.exit("two runs generated different tokens")
    report = {
        "system": llama.llama_print_system_info().decode(),
        "prefill_tokens_per_s": args.pp / statistics.median(prefill for prefill, _, _ in runs),
        "decode_tokens_per_s": args.tg / statistics.median(decode for _, decode, _ in runs),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verified": True,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
