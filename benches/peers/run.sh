#!/usr/bin/env bash
# Our engine and llama.cpp (PyPI's llama-cpp-python, compiled for this machine) in turns, on a synthetic model with the 2B shapes.
# Usage: benches/peers/run.sh [--threads N] [--rounds N] [--depth N] [--llama-bench PATH --gguf FILE]...
# Needs python 3 with venv, a C++ compiler, the network for PyPI the first time, and 3 GB of disk. BITNET and FIXTURES may name binaries
# that are built already.
set -euo pipefail
cd "$(dirname "$0")/../.."
target="${CARGO_TARGET_DIR:-target}"
work="$target/peers"
mkdir -p "$work"

if [ -z "${BITNET:-}" ] || [ -z "${FIXTURES:-}" ]; then
    cargo build --release --locked --workspace --bins
fi
BITNET="${BITNET:-$target/release/bitnet}"
FIXTURES="${FIXTURES:-$target/release/fixtures}"

# No wheel and no cache: either may be for another machine's instruction set.
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" "$work/venv/bin/pip" install --quiet --no-cache-dir \
    --no-binary llama-cpp-python -r benches/peers/requirements.txt

# The folder gets its name once it is whole.
if [ ! -d "$work/2b" ]; then
    rm -rf "$work/2b.part"
    "$FIXTURES" synth --preset bitnet-b1.58-2B-4T --seed 1 --out "$work/2b.part"
    mv "$work/2b.part" "$work/2b"
fi
# Architecture `bitnet`: the nearest that llama.cpp runs. It has SiLU where the model has squared ReLU, which costs about the same.
[ -f "$work/2b-tq2_0.gguf" ] || "$BITNET" convert "$work/2b" "$work/2b-tq2_0.gguf" --to gguf-tq2_0 --head q6_k --architecture bitnet

exec "$work/venv/bin/python" benches/peers/rounds.py --bitnet "$BITNET" --model "$work/2b" --peer-model "$work/2b-tq2_0.gguf" \
    --threads "$(nproc)" "$@"
