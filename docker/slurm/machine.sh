#!/usr/bin/env bash
# Entry point of the containers of compose.yaml: machine.sh controller | node. The controller creates the shared munge key.
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
