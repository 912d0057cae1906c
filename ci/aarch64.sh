#!/usr/bin/env bash
# The kernels on AArch64 without such a machine: compiled by Debian's cross compiler and run under emulation, once on a processor with
# everything and once on one without dot products. The compiler is older than the workspace's, so what is built is the harness in
# ci/aarch64: the kernels, their tests and nothing else. What the emulator cannot tell is how fast they are.
#
# Needs root (for debootstrap and chroot), debootstrap with Debian's keys, cargo; the network for a Debian mirror and crates.io.
# Everything is kept in target/aarch64, 2 GB; delete it to start afresh.
set -euo pipefail
cd "$(dirname "$0")/.."

suite=trixie # rustc 1.85
tree=target/aarch64/tree
target=aarch64-unknown-linux-gnu

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

# Runs a command in the tree, with nothing of this machine's environment.
inside() {
    chroot "$tree" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive \
        CARGO_BUILD_JOBS="${CARGO_BUILD_JOBS:-$(nproc)}" CARGO_INCREMENTAL=0 CARGO_NET_OFFLINE=true \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc "$@"
}

[ "$(id -u)" = 0 ] || { echo "aarch64: debootstrap and chroot need root" >&2; exit 1; }
command -v debootstrap >/dev/null || { echo "aarch64: debootstrap is missing" >&2; exit 1; }

if [ ! -e "$tree/ready" ]; then
    step "Debian $suite"
    rm -rf "$tree"
    mkdir -p "$tree"
    # The mirror that this machine's apt uses for Debian, if any; else debootstrap's own default.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' 2>/dev/null | head -n 1 || true)
    debootstrap --variant=minbase "$suite" "$tree" ${mirror:+"$mirror"} >"$tree.log" || { tail "$tree.log" >&2; exit 1; }
    inside dpkg --add-architecture arm64
    inside apt-get -qq update
    inside apt-get -qq install --no-install-recommends cargo rustc rust-clippy libstd-rust-dev:arm64 gcc-aarch64-linux-gnu \
        libc6-dev-arm64-cross qemu-user >>"$tree.log" 2>&1 || { tail "$tree.log" >&2; exit 1; }
    touch "$tree/ready"
fi

step "sources"
# Copied, not mounted: that a container may do as well. Times are kept, so that only what changed is compiled again.
rm -rf "$tree/src/engine" "$tree/src/ci"
mkdir -p "$tree/src/engine/contracts" "$tree/src/ci/aarch64" "$tree/src/.cargo"
cp -a engine/src "$tree/src/engine/"
cp -a engine/contracts/src "$tree/src/engine/contracts/"
cp -a ci/aarch64/{Cargo.toml,Cargo.lock,src} "$tree/src/ci/aarch64/"
# The dependencies are fetched out here, by whatever way this machine's cargo knows.
cargo vendor --quiet --locked --manifest-path ci/aarch64/Cargo.toml "$tree/src/vendor" >/dev/null
cat >"$tree/src/.cargo/config.toml" <<'TOML'
[build]
target-dir = "/src/target"
[source.crates-io]
replace-with = "vendored"
[source.vendored]
directory = "/src/vendor"
TOML
inside rustc --version
inside qemu-aarch64 --version | head -n 1

step "lints"
# `cargo clippy` itself wants /proc, which is not mounted. Two lints have since been made narrower.
inside RUSTC_WORKSPACE_WRAPPER=clippy-driver RUSTFLAGS="-D warnings -A clippy::needless_range_loop -A clippy::precedence" \
    sh -c "cd /src/ci/aarch64 && cargo check --quiet --locked --target $target --all-targets"

# Tests on the processor $1, which has the instruction sets $2 and no others: a test of the harness holds it to that.
test_on() {
    step "$1: $2"
    inside CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu $1" EXPECTED_ISAS="$2" \
        sh -c "cd /src/ci/aarch64 && cargo test --locked --target $target --lib"
}
test_on max "portable neon dotprod"
test_on cortex-a53 "portable neon"

step "done"
