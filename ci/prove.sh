#!/usr/bin/env bash
# Holds the suite against both zoos, then deletes each check in turn: without it the proof must fail.
# CONFORMANCE may name a binary that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/conformance
mkdir -p "$out"
conformance() {
    if [ -n "${CONFORMANCE:-}" ]; then
        "$CONFORMANCE" "$@"
    else
        cargo run --release --locked -p conformance -- "$@"
    fi
}
conformance prove --json "$out/proof.json"
checks=$(conformance prove --recorded "$out/proof.json" --checks)
for check in $checks; do
    if conformance prove --recorded "$out/proof.json" --without "$check" >/dev/null; then
        echo "prove: $check may be deleted and nobody notices" >&2
        exit 1
    fi
done
echo "each of $(wc -w <<<"$checks") checks, deleted, leaves a fault alive"
