#!/usr/bin/env bash
# Other tools' readers and writers against ours. Needs python 3 with venv, and the network for PyPI.
set -euo pipefail
cd "$(dirname "$0")/.."
BITNET="${BITNET:-${CARGO_TARGET_DIR:-target}/debug/bitnet}"
[ -x "$BITNET" ] || cargo build -p bitnet-engine --locked

venv="$(mktemp -d)"
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet -r ci/interop/requirements.txt
"$venv/bin/python" ci/interop/gguf_package.py "$BITNET" fixtures/models/tiny
