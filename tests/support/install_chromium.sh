#!/usr/bin/env bash
# Install the browser of the tests from the distribution's packages, unless there is one.
set -euo pipefail
if command -v chromium >/dev/null; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "install_chromium.sh: no chromium and no apt-get here; install chromium with this system's package manager" >&2
  exit 1
fi
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo)
install() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 chromium
}
# Fresh containers have no package lists.
install || { "${as_root[@]}" apt-get update && install; }
