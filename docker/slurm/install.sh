#!/usr/bin/env bash
# Install the programs that lab.sh runs, Slurm and munge, unless they are already installed.
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
    "commands, munge, util-linux and procps with the system's package manager, or use a Debian or Ubuntu container." >&2
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
  # DPkg::Lock::Timeout: another installation may be running on this machine.
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=120 slurm-wlm munge util-linux procps
}

# New containers have no package lists, and lists of old ones may name removed packages.
install || { "${as_root[@]}" apt-get update && install; }

if ! have_all; then
  echo "install.sh: the packages are installed, but some of Slurm's programs are still missing" >&2
  exit 1
fi
