"""Alternates `bitnet bench` with other engines and prints medians and ratios."""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path


def ours(args):
    command = [args.bitnet, "bench", "--model", args.model, "--pp", args.pp, "--tg", args.tg]
    if args.depth:
        # What the peers keep keys and values in.
        command += ["--depth", args.depth, "--kv", "f16"]
    report = run([*command, "--threads", args.threads, "--runs", args.runs, "--json"])
    if report.get("verified") is not True:
        sys.exit("bitnet bench: the output was not verified")
    return report["prefill_tokens_per_s"], report["decode_tokens_per_s"]


def llama_cpp_python(args):
    peer = Path(__file__).with_name("peer.py")
    command = [sys.executable, peer, "--model", args.peer_model, "--pp", args.pp, "--tg", args.tg]
    report = run([*command, "--threads", args.threads, "--runs", args.runs, "--depth", args.depth])
    if report.get("verified") is not True:
        sys.exit("peer.py: the output was not verified")
    return report["prefill_tokens_per_s"], report["decode_tokens_per_s"]


def llama_bench(args, binary, gguf):
    # Its decode starts with an empty cache, ours behind the prompt: the difference is in its favour.
    flags = ["-p", args.pp, "-n", args.tg, "-t", args.threads, "-r", args.runs, "-o", "json"]
    behind = 0
    if args.depth and "--n-depth" in subprocess.run([*shlex.split(binary), "--help"], stdout=subprocess.PIPE, text=True).stdout:
        flags += ["-d", args.depth]
    elif args.depth:
        # ik_llama.cpp measures decode behind a prompt; its prefill is at depth 0.
        flags[flags.index("-n") + 1] = 0
        flags += ["-gp", f"{args.depth},{args.tg}"]
        behind = args.depth
    tests = run([*shlex.split(binary), "-m", gguf, *flags])
    prefill = [t for t in tests if t["n_prompt"] == args.pp and t["n_gen"] == 0]
    decode = [t for t in tests if t["n_prompt"] == behind and t["n_gen"] == args.tg]
    return tuple(statistics.median(test["samples_ts"]) for [test] in (prefill, decode))


def run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with {done.returncode}")
    return json.loads(done.stdout)


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--bitnet", required=True)
    args.add_argument("--model", required=True, help="for bitnet")
    args.add_argument("--peer-model", help="GGUF file for llama-cpp-python; without it, that engine is left out")
    args.add_argument("--threads", type=int, required=True)
    args.add_argument("--pp", type=int, default=512, help="prompt tokens")
    args.add_argument("--tg", type=int, default=64, help="generated tokens")
    args.add_argument("--depth", type=int, default=0, help="positions before prompt and generated tokens")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--runs", type=int, default=3, help="runs of each engine in a round; their median counts")
    args.add_argument("--llama-bench", action="append", default=[], metavar="COMMAND",
                      help="a path, with flags if need be; with --gguf; repeatable")
    args.add_argument("--gguf", action="append", default=[], metavar="FILE")
    args = args.parse_args()
    if len(args.llama_bench) != len(args.gguf):
        sys.exit("--llama-bench and --gguf come in pairs")

    engines = {"bitnet": ours}
    if args.peer_model:
        engines["llama-cpp-python"] = llama_cpp_python
    for number, (binary, gguf) in enumerate(zip(args.llama_bench, args.gguf), 1):
        path, *flags = shlex.split(binary)
        name = " ".join([f"{number}:", Path(path).name, Path(gguf).name, *flags, "(output not verified)"])
        engines[name] = lambda args, pair=(binary, gguf): llama_bench(args, *pair)

    # Engines whose threads wait in a loop lose many times over to any other load: such ratios say nothing.
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the machine is busy (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    figures = {name: [] for name in engines}
    for number in range(1, args.rounds + 1):
        # Turned round every time, so that no engine always follows the same one.
        order = list(engines) if number % 2 else list(reversed(engines))
        for name in order:
            figures[name].append(engines[name](args))
            prefill, decode = figures[name][-1]
            print(f"round {number}  {prefill:8.1f} {decode:8.2f}  {name}", file=sys.stderr)

    what = f"prefill {args.pp} tokens, decode {args.tg}, depth {args.depth}"
    print(f"medians of {args.rounds} rounds, {args.threads} threads: {what}, tokens/s")
    print("  prefill    decode  ours/theirs: prefill  decode")
    for name, theirs in figures.items():
        prefill, decode = (statistics.median(column) for column in zip(*theirs))
        line = f"{prefill:9.1f} {decode:9.2f}"
        if name == "bitnet":
            line += 30 * " "
        else:
            # Of each round by itself: what else the machine does then touches both.
            ratios = [(a / c, b / d) for (a, b), (c, d) in zip(figures["bitnet"], theirs)]
            line += "{:21.2f}x {:6.2f}x".format(*(statistics.median(column) for column in zip(*ratios)))
        print(f"{line}  {name}")


if __name__ == "__main__":
    main()
