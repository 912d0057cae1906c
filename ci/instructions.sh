#!/usr/bin/env bash
# Counts the instructions of the kernels under callgrind and holds them to ci/instructions.txt. Counts repeat where times do not: what
# gets slower by doing more shows on a busy machine too. Needs valgrind; installs the Debian package where it is lacking and it may.
# Usage: ci/instructions.sh [--update]
# KERNEL_ONCE may name the binary; it must be of the dev profile, as the counts in the file are.
set -euo pipefail
cd "$(dirname "$0")/.."
expected=ci/instructions.txt
# More than this away from the recorded count, in percent, fails above and asks for a new record below.
allowed=2

case "${1:-}" in
"" | --update) ;;
*)
    echo "usage: ci/instructions.sh [--update]" >&2
    exit 2
    ;;
esac
if [ "$(uname -m)" != x86_64 ]; then
    echo "ci/instructions.sh: the counts are of x86-64" >&2
    exit 2
fi
if ! command -v valgrind >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "ci/instructions.sh: install valgrind (Debian: apt-get install valgrind)" >&2
        exit 2
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends valgrind
fi
binary="${KERNEL_ONCE:-${CARGO_TARGET_DIR:-target}/debug/kernel_once}"
# `cargo test --workspace` has built it, with the same features.
[ -x "$binary" ] || cargo test --workspace --locked --no-run --test bins

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# One part of the profile for every return from `counted`. The two patterns must differ: valgrind takes only one option a pattern.
if ! valgrind --tool=callgrind --callgrind-out-file="$work/out" --collect-atstart=no \
    --toggle-collect='kernel_once::counted*' --dump-after='*_once::counted*' "$binary" >"$work/names" 2>"$work/log"; then
    cat "$work/log" >&2
    exit 1
fi
number=0
while read -r name; do
    number=$((number + 1))
    count="$(sed -n 's/^totals: //p' "$work/out.$number")"
    printf '%-28s %s\n' "$name" "$count"
done <"$work/names" >"$work/counts"
parts="$(find "$work" -name 'out.*' | wc -l)"
if [ "$number" -eq 0 ] || [ "$parts" -ne "$number" ]; then
    echo "ci/instructions.sh: $number kernels ran, $parts were counted" >&2
    exit 1
fi

compiler="$(rustc --version)"
if [ "${1:-}" = --update ]; then
    {
        echo "# Instructions of one run of each kernel on the input of benches/src/cases, dev profile, by callgrind."
        echo "# Written by \`ci/instructions.sh --update\`. Compiled by $compiler."
        cat "$work/counts"
    } >"$expected"
    echo "$expected: $number counts"
    exit 0
fi
grep -qF "$compiler" "$expected" || echo "note: $expected was recorded with another compiler than $compiler" >&2
awk -v allowed="$allowed" -v file="$expected" '
    /^#/ { next }
    NR == FNR { recorded[$1] = $2; next }
    {
        seen[$1] = 1
        if (!($1 in recorded)) { printf "FAIL  %s is not in %s: run ci/instructions.sh --update\n", $1, file; failed = 1; next }
        change = 100 * ($2 / recorded[$1] - 1)
        verdict = "ok"
        if (!($2 > 0) || change > allowed) { verdict = "FAIL"; failed = 1 }
        else if (change < -allowed) { verdict = "fewer"; fewer = 1 }
        printf "%-5s %-28s %11d %+7.2f %%\n", verdict, $1, $2, change
    }
    END {
        for (name in recorded) if (!(name in seen)) { printf "FAIL  %s was not counted\n", name; failed = 1 }
        if (fewer) print "fewer instructions than recorded: run ci/instructions.sh --update, so that they stay so"
        if (failed) print "more instructions than recorded by over " allowed " %, or other kernels: if it must be so, run ci/instructions.sh --update and say why"
        exit failed
    }' "$expected" "$work/counts"
