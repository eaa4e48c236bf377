#!/usr/bin/env bash
# What a container of compose.yaml runs: machine.sh controller | node. All share the munge key that the controller makes.
set -euo pipefail
key=/etc/munge/shared/munge.key

if [ "${1:-}" = controller ] && [ ! -e "$key" ]; then
  chown munge: "${key%/*}"
  (umask 077 && head -c 128 /dev/urandom >"$key.new" && chown munge: "$key.new" && mv "$key.new" "$key")
fi
until [ -e "$key" ]; do
  sleep 0.2
done
setpriv --reuid munge --regid munge --clear-groups munged --key-file="$key"

mkdir -p /var/spool/slurmctld /var/spool/slurmd
case "${1:-}" in
  controller) exec slurmctld -D ;;
  node) exec slurmd -D -N "$(hostname)" ;;
  *)
    echo "machine.sh: usage: machine.sh controller|node" >&2
    exit 2
    ;;
esac
