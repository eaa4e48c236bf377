#!/usr/bin/env bash
# Install Montessori in a new Debian in a temporary folder: what the images and `make test` install needs nothing else of this
# machine. Part of `make test-all`; needs root, debootstrap and the package indexes.
#
#   clean_install.sh [TARGET...]     targets of the Makefile, by default the driver as locked, and what the tests need
#
# SUITE (bookworm), MIRROR (that of this machine), PIP_* (a folder of wheels, too) and TORCH are taken from the environment.
set -euo pipefail

[ "$(id -u)" = 0 ] || { echo "clean_install.sh: needs root for chroot; give the command with sudo" >&2; exit 1; }
command -v debootstrap >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends debootstrap; } >/dev/null ||
  { echo "clean_install.sh: needs debootstrap: apt-get install debootstrap" >&2; exit 1; }
# In namespaces of its own: whatever it mounts and starts is gone when it ends.
[ -n "${INSIDE:-}" ] || exec env INSIDE=1 unshare --mount --pid --fork --kill-child "$0" "$@"

cd "$(dirname "$0")/../../.."
[ $# -gt 0 ] || set -- install-driver .venv/.dev
tree=$(mktemp --directory)
chmod 755 "$tree"  # packages' scripts run as users of their own
trap 'umount --recursive "$tree"{/proc,/dev,${PIP_FIND_LINKS:-/none}} 2>/dev/null || true; rm -rf --one-file-system "$tree"' EXIT
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}

debootstrap --variant=minbase --include=ca-certificates,g++,git,make,python3-dev,python3-venv \
  "${SUITE:-bookworm}" "$tree" "$mirror" >"$tree.log" || { tail -n 20 "$tree.log" >&2; exit 1; }
rm "$tree.log"
mount --bind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
# How this machine reaches the package indexes, and whom it trusts.
for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
  [ ! -e "$file" ] || install -D --mode 644 "$file" "$tree$file"
done
if [ -d "${PIP_FIND_LINKS:-}" ]; then
  mkdir --parents "$tree$PIP_FIND_LINKS"
  mount --bind "$PIP_FIND_LINKS" "$tree$PIP_FIND_LINKS"
fi
mkdir "$tree/src"
git ls-files --cached --others --exclude-standard -z | tar --create --null --files-from - | tar --extract --directory "$tree/src"

inside() { chroot "$tree" env PIP_QUIET=1 HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -c "cd /src && $1"; }
inside "docker/slurm/install.sh" >/dev/null
inside "slurmctld -V"
for target in "$@"; do
  case "$target" in
    install-*) inside "make --silent $target VENV=/opt/${target#install-} && /opt/${target#install-}/bin/python -m pip check" ;;
    *) inside "make --silent $target ${TORCH:+TORCH='$TORCH'}" ;;
  esac
done
[ ! -x "$tree/opt/driver/bin/montessori" ] || inside "/opt/driver/bin/montessori methods"
echo "installed in a clean Debian: $*"
