#!/usr/bin/env bash
# Runs the conformance suite against the project's own backends and holds the report to ci/thresholds.toml.
# Usage: ci/gate.sh [PROFILE]      (an SLA profile of the thresholds file)
set -euo pipefail
cd "$(dirname "$0")/.."
report=target/conformance/report.json
mkdir -p "$(dirname "$report")"
cargo run --locked -p conformance -- run --json "$report" --junit target/conformance/junit.xml
cargo run --locked -p conformance -- gate --thresholds ci/thresholds.toml ${1:+--profile "$1"} "$report"
