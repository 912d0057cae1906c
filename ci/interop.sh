#!/usr/bin/env bash
# Other tools' readers and writers against ours. Needs python 3 with venv, a C++ compiler, and the network for PyPI. PYTHON may name a
# python that has the packages already.
set -euo pipefail
cd "$(dirname "$0")/.."
BITNET="${BITNET:-${CARGO_TARGET_DIR:-target}/debug/bitnet}"
[ -x "$BITNET" ] || cargo build -p bitnet-engine --locked

python="${PYTHON:-}"
if [ -z "$python" ]; then
    venv="$(mktemp -d)"
    trap 'rm -rf "$venv"' EXIT
    python3 -m venv "$venv"
    # llama.cpp is compiled here, some ten minutes on two cores.
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" "$venv/bin/pip" install --quiet --no-binary llama-cpp-python -r ci/interop/requirements.txt
    python="$venv/bin/python"
fi
"$python" ci/interop/gguf_package.py "$BITNET" fixtures/models/tiny
"$python" ci/interop/upstream.py "$BITNET" fixtures/models/tiny
"$python" ci/interop/hf_folder.py "$BITNET" fixtures/models/tiny fixtures/models/c09-h512-gguf
