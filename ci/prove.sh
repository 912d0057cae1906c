#!/usr/bin/env bash
# Holds the suite against both zoos, then deletes each check in turn: without it the proof must fail. Puts the kill matrix on the page of
# the report in target/conformance, where ci/gate.sh has left one.
# CONFORMANCE may name a binary that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/conformance
proof="$out/proof.json"
mkdir -p "$out"
conformance() {
    if [ -n "${CONFORMANCE:-}" ]; then
        "$CONFORMANCE" "$@"
    else
        cargo run --release --locked -p conformance -- "$@"
    fi
}
rm -f "$proof"
code=0
conformance prove --json "$proof" || code=$?
if [ -e "$proof" ] && [ -e "$out/report.json" ]; then
    conformance report "$out/report.json" --html "$out/report.html" --proof "$proof"
fi
[ "$code" -eq 0 ] || exit "$code"
checks=$(conformance prove --recorded "$proof" --checks)
for check in $checks; do
    if conformance prove --recorded "$proof" --without "$check" >/dev/null; then
        echo "prove: $check may be deleted and nobody notices" >&2
        exit 1
    fi
done
echo "each of $(wc -w <<<"$checks") checks, deleted, leaves a fault alive"
