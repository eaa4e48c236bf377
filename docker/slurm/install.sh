#!/usr/bin/env bash
# Installs what lab.sh runs: Slurm's daemons and commands, and munge. Changes nothing where they are there already.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

have_all() {
  local program
  for program in slurmctld slurmd sbatch srun squeue scancel scontrol sinfo munged munge unshare pgrep; do
    command -v "$program" >/dev/null || return 1
  done
}

if have_all; then
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  echo "install.sh: Slurm is missing and this system has no apt-get. Install slurmctld, slurmd, Slurm's client" \
    "commands, munge, util-linux and procps with its own package manager, or work in a Debian or Ubuntu container." >&2
  exit 1
fi

as_root=()
if [ "$(id -u)" != 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "install.sh: needs root to install packages; as root: apt-get install slurm-wlm munge procps" >&2
    exit 1
  fi
  as_root=(sudo)
fi

install() {
  # The lock's time-out: elsewhere on the machine another installation may be running.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 slurm-wlm munge util-linux procps
}

# Fresh containers have no package lists, old ones have lists that name packages no longer there.
install || { "${as_root[@]}" apt-get update && install; }

if ! have_all; then
  echo "install.sh: the packages are installed, but some of Slurm's programs are still missing" >&2
  exit 1
fi
