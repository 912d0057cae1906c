#!/usr/bin/env bash
# The engine's tests with every access to memory watched: ci/sanitize.sh [address|valgrind]... (both). Fails on the first finding.
#
# address: AddressSanitizer, by the stable compiler (RUSTC_BOOTSTRAP opens the switch). All tests of the engine on the best instruction set,
# then again with each lower one forced on whatever takes the best. The tests of the kernels go through all that there are anyway.
# valgrind: memcheck, which also sees decisions on memory that nobody wrote. It knows no AVX-512 and says so to whoever asks the
# processor, so AVX2 and the portable kernels are what runs. Installs the Debian package where it is lacking and it may.
#
# The sanitizer does not look into memory that is mapped, as weights are: in the tests of the kernels the pages behind it are forbidden.
set -euo pipefail
cd "$(dirname "$0")/.."
export CARGO_INCREMENTAL=0
host="$(rustc -vV | sed -n 's/^host: //p')"

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

# What cannot be told apart from the tool's own doing: peaks of the address space and how fast memory is.
skip=(--skip no_claim_of_a_header_is_believed --skip limits_are_numbers_and_caches_are_faster_than_memory)

address() {
    # A target of its own, so that the flags are not those of build scripts.
    tests() {
        RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS="detect_stack_use_after_return=1:strict_string_checks=1" \
            cargo test -p bitnet-engine --locked --target "$host" --target-dir target/sanitize "$@"
    }
    step "AddressSanitizer: build"
    tests --no-run
    local isas best
    isas="$("target/sanitize/$host/debug/bitnet" backends | sed -n 's/.*(this CPU has \([^;]*\);.*/\1/p')"
    best="${isas##*, }"
    [ -n "$best" ] || { echo "ci/sanitize.sh: which instruction sets there are is not said" >&2; exit 1; }
    step "AddressSanitizer: $best"
    tests --lib --bins --tests -- "${skip[@]}"
    for isa in ${isas//,/}; do
        [ "$isa" != "$best" ] || continue
        step "AddressSanitizer: $isa"
        BITNET_ISA="$isa" tests --lib --tests -- "${skip[@]}" --skip kernels:: --skip ternary::
    done
}

with_valgrind() {
    if ! command -v valgrind >/dev/null; then
        if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
            echo "ci/sanitize.sh: install valgrind (Debian: apt-get install valgrind)" >&2
            exit 2
        fi
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind
    fi
    step "valgrind"
    local triple="${host//-/_}"
    env "CARGO_TARGET_${triple^^}_RUNNER=valgrind --quiet --error-exitcode=99 --fair-sched=yes --leak-check=no" PROPTEST_CASES=4 \
        cargo test -p bitnet-engine --locked --lib -- --test-threads=1 "${skip[@]}"
}

runs=("$@")
[ "${#runs[@]}" -gt 0 ] || runs=(address valgrind)
for run in "${runs[@]}"; do
    case "$run" in
    address) address ;;
    valgrind) with_valgrind ;;
    *)
        echo "usage: ci/sanitize.sh [address|valgrind]..." >&2
        exit 2
        ;;
    esac
done
step "done: no finding"
