#!/usr/bin/env bash
# Runs every fuzz target for a while: ci/fuzz.sh [SECONDS in all, 120] [TARGET...]. Fails on a crash, an input that takes more than a
# second, and memory beyond twice the input and 64 MiB. SANITIZER=none does without AddressSanitizer.
#
# Needs a C++ compiler, for libFuzzer. The compiler is the stable one: coverage and the sanitizer's runtime are in it, behind switches
# that RUSTC_BOOTSTRAP opens. `cargo fuzz run TARGET` in engine/ does the same where cargo-fuzz and a nightly compiler are installed.
#
# Inputs that reach new code stay in engine/fuzz/corpus/, so that the next run begins where this one ended; what fails is left in
# engine/fuzz/artifacts/TARGET/. For a long run give more seconds, and JOBS for several processes a target.
set -euo pipefail
cd "$(dirname "$0")/../engine/fuzz"

seconds="${1:-120}"
shift || true
targets=("$@")
[ "${#targets[@]}" -gt 0 ] || targets=(gguf safetensors_config tokenizer pack_roundtrip kernel_diff)
sanitizer="${SANITIZER:-address}"
host="$(rustc -vV | sed -n 's/^host: //p')"

flags="--cfg fuzzing -Cdebug-assertions -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares"
if [ "$sanitizer" != none ]; then
    export RUSTC_BOOTSTRAP=1
    flags+=" -Zsanitizer=$sanitizer"
fi
# A target of its own, so that the flags are not those of build scripts.
RUSTFLAGS="$flags" cargo build --release --locked --target "$host"

for target in "${targets[@]}"; do
    mkdir -p "corpus/$target" "artifacts/$target"
    printf '\n== %s\n' "$target"
    "target/$host/release/$target" -max_total_time="$((seconds / ${#targets[@]}))" -timeout=1 -rss_limit_mb=2048 -print_final_stats=1 \
        -verbosity=0 -fork="${JOBS:-0}" -artifact_prefix="artifacts/$target/" "corpus/$target" "seeds/$target"
done
