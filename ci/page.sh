#!/usr/bin/env bash
# Opens the HTML page of a real report in headless Chromium; screenshots go to target/conformance/page.
# Installs the Debian packages chromium and chromium-driver where they are lacking and it may.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v chromedriver >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        echo "ci/page.sh: install Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)" >&2
        exit 2
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver
fi
# All of the workspace, as the other tests: a package alone would be built with other features, dependencies and all.
CONFORMANCE_PAGE=required cargo test --workspace --locked --test page
