#!/usr/bin/env bash
# The engine's tests with every access to memory watched: ci/sanitize.sh [kernels|loaders|engine]... (all three). Fails on the first finding.
#
# kernels  the kernels alone (the harness of ci/aarch64, which compiles in a minute) under AddressSanitizer on every instruction set of this
#          machine, then under valgrind's memcheck, which also sees decisions on memory that nobody wrote.
# loaders  readers of files and packings, as far as they are unit tests, under memcheck; the engine is compiled as for its tests.
# engine   all tests of the engine under AddressSanitizer, then those that take the best instruction set with each lower one forced.
#
# AddressSanitizer is the stable compiler's, behind a switch that RUSTC_BOOTSTRAP opens; what it builds has targets of its own, so that its
# flags are not those of build scripts. Neither tool looks for ends within mapped memory, as weights are: in the tests of the kernels the
# pages behind it are forbidden. memcheck knows no AVX-512 and says so to whoever asks the processor: there AVX2 and the portable kernels
# run, with fewer cases by chance, one after the other. Installs the Debian package of valgrind where it is lacking and it may.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_INCREMENTAL=0
host="$(rustc -vV | sed -n 's/^host: //p')"

# What cannot be told apart from a tool's own doing: the peak of the address space.
skip=(--skip no_claim_of_a_header_is_believed)

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

address() {
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS="detect_stack_use_after_return=1" \
        cargo test --locked --target "$host" --target-dir target/sanitize "$@"
}

memcheck() {
    if ! command -v valgrind >/dev/null; then
        if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
            echo "ci/sanitize.sh: install valgrind (Debian: apt-get install valgrind)" >&2
            exit 2
        fi
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind
    fi
    local variable="${host//-/_}"
    variable="CARGO_TARGET_${variable^^}_RUNNER"
    # What is still reachable at the end, threads that sleep for instance, is no finding.
    env PROPTEST_CASES=4 "$variable=valgrind --quiet --error-exitcode=99 --fair-sched=yes --leak-check=no" \
        cargo test --locked "$@"
}

kernels() {
    step "kernels: AddressSanitizer"
    (cd ci/aarch64 && address --lib -- "${skip[@]}")
    step "kernels: memcheck"
    (cd ci/aarch64 && memcheck --lib -- --test-threads=1 "${skip[@]}")
}

loaders() {
    step "loaders: memcheck"
    memcheck -p bitnet-engine --lib -- --test-threads=1 "${skip[@]}" --skip kernels:: model:: ternary:: load_tests::
}

engine() {
    step "engine: AddressSanitizer, build"
    address -p bitnet-engine --no-run
    local isas best
    isas="$("target/sanitize/$host/debug/bitnet" backends | sed -n 's/.*(this CPU has \([^;]*\);.*/\1/p')"
    best="${isas##*, }"
    [ -n "$best" ] || { echo "ci/sanitize.sh: \`bitnet backends\` does not say which instruction sets there are" >&2; exit 1; }
    step "engine: AddressSanitizer, $best"
    address -p bitnet-engine --lib --bins --tests -- "${skip[@]}"
    for isa in ${isas//,/}; do
        [ "$isa" != "$best" ] || continue
        step "engine: AddressSanitizer, $isa"
        BITNET_ISA="$isa" address -p bitnet-engine --lib --tests -- "${skip[@]}" --skip kernels:: --skip ternary::
    done
}

runs=("$@")
[ "${#runs[@]}" -gt 0 ] || runs=(kernels loaders engine)
for run in "${runs[@]}"; do
    case "$run" in
    kernels | loaders | engine) "$run" ;;
    *)
        echo "usage: ci/sanitize.sh [kernels|loaders|engine]..." >&2
        exit 2
        ;;
    esac
done
step "done: nothing found"
