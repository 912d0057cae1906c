#!/usr/bin/env bash
# Runs the conformance suite against the project's own backends and holds the report to ci/thresholds.toml.
# Usage: ci/gate.sh [PROFILE]      (an SLA profile of the thresholds file)
# CONFORMANCE may name a binary that is built already.
set -euo pipefail
cd "$(dirname "$0")/.."
report=target/conformance/report.json
mkdir -p "$(dirname "$report")"
conformance() {
    if [ -n "${CONFORMANCE:-}" ]; then
        "$CONFORMANCE" "$@"
    else
        cargo run --release --locked -p conformance -- "$@"
    fi
}
conformance run --json "$report" --junit target/conformance/junit.xml \
    --html target/conformance/report.html --badge target/conformance/badge.svg
conformance gate --thresholds ci/thresholds.toml ${1:+--profile "$1"} "$report"
