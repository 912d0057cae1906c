#!/usr/bin/env bash
# Holds a report of the conformance suite on the project's own backends to ci/thresholds.toml, and writes it in its other forms.
# Usage: ci/gate.sh [PROFILE]      (an SLA profile of the thresholds file)
# CONFORMANCE may name a binary that is built already, and CONFORMANCE_JSON the report that the tests of the same build have left;
# without it the suite runs here.
set -euo pipefail
cd "$(dirname "$0")/.."
out=target/conformance
report="${CONFORMANCE_JSON:-$out/report.json}"
mkdir -p "$out"
conformance() {
    if [ -n "${CONFORMANCE:-}" ]; then
        "$CONFORMANCE" "$@"
    else
        cargo run --release --locked -p conformance -- "$@"
    fi
}
if [ -z "${CONFORMANCE_JSON:-}" ]; then
    rm -f "$report"
    conformance run --json "$report" || true # what is not green does not pass the gate either
elif [ ! -x "${CONFORMANCE:-}" ] || [ ! "$report" -nt "$CONFORMANCE" ]; then
    echo "ci/gate.sh: $report is not there, or older than the binary: the tests of this build have not run as a whole" >&2
    exit 2
fi
conformance report "$report" --junit "$out/junit.xml" --html "$out/report.html" --badge "$out/badge.svg"
conformance gate --whole --thresholds ci/thresholds.toml ${1:+--profile "$1"} "$report"
