#!/usr/bin/env bash
# A temporary Slurm cluster of several nodes on this machine, for tests and to try things out.
#
#   lab.sh start           start a new cluster, with an empty queue
#   lab.sh env             print the environment of the cluster: eval "$(lab.sh env)"
#   lab.sh kill-node N     crash node N: its daemon and all its processes die at once
#   lab.sh start-node N    start node N again
#   lab.sh restart-controller   stop slurmctld and start it again after 3 seconds
#   lab.sh kill-controller      the same with SIGKILL: unsaved state is lost
#   touch $LAB/broken-nodeN     make node N fail to launch jobs (as root)
#   lab.sh stop
#
# Environment variables: LAB (folder, .slurmlab), NODES (2), CPUS and MEMORY in MB of each node (8, 16000; may exceed the
# machine's), GPUS of each node (0; simulated, scheduled like real ones).
#
# As root, every node has a separate host name, process namespace and /dev/shm, as on a real cluster. For an ordinary
# user, nodes share those of the machine. Daemons listen on 127.0.0.1 only.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

LAB=$(realpath -m "${LAB:-.slurmlab}")
NODES=${NODES:-2} CPUS=${CPUS:-8} MEMORY=${MEMORY:-16000} GPUS=${GPUS:-0}
export SLURM_CONF="$LAB/slurm.conf"
SOCKET=$LAB/munge.socket

die() { echo "lab.sh: $*" >&2; exit 1; }

wait_for() { # SECONDS WHAT COMMAND...
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= deadline)); then
      tail -n 20 "$LAB"/log/* >&2 || true
      stop
      die "$what did not start; the last lines of the logs are above"
    fi
    sleep 0.1
  done
}

# Check the process name too: after a reboot, the id in the pid file may belong to another program.
running() { # PIDFILE
  local pid
  pid=$(cat "$1" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) =~ ^(unshare|slurm|munged) ]] &&
    ! grep -q '^State:.Z' "/proc/$pid/status"
}

free_ports() { # COUNT: print the first of COUNT consecutive free ports, so that labs do not collide
  local base port
  while true; do
    base=$((20000 + RANDOM % 10000))
    for ((port = base; port < base + $1; port++)); do
      ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || continue 2
    done
    echo "$base"
    return
  done
}

can_isolate() {
  [ "$(id -u)" = 0 ] && unshare --mount --uts --pid --fork --mount-proc true 2>/dev/null
}

configure() {
  local port host user node
  port=$(free_ports $((NODES + 1)))
  host=$(hostname -s)
  user=$(id -un)
  mkdir -p "$LAB"/{log,pid,state,spool,dev}
  touch "$LAB/.slurm-lab"
  head -c 128 /dev/urandom >"$LAB/munge.key"
  chmod 600 "$LAB/munge.key"
  cp /etc/hosts "$LAB/hosts"
  ! can_isolate || touch "$LAB/isolated"

  cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/pid/slurmctld
SlurmdPidFile=$([ -e "$LAB/isolated" ] && echo "$LAB/spool/%n/pid" || echo "$LAB/pid/%n")
SlurmctldLogFile=$LAB/log/slurmctld
SlurmdLogFile=$LAB/log/%n
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/completed
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=64
# Start jobs at once: tests wait for them. A requeued job waits until its old credential has expired.
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
AuthInfo=socket=$SOCKET,cred_expire=5
KillWait=5
Prolog=$LAB/prolog
MaxArraySize=501
CONF
  # The prolog fails on nodes with a broken-nodeN file.
  printf '#!/bin/sh\n[ ! -e "%s/broken-$(hostname)" ]\n' "$LAB" >"$LAB/prolog"
  chmod 755 "$LAB/prolog"
  if ((GPUS > 0)); then
    echo "GresTypes=gpu" >>"$SLURM_CONF"
    echo "NodeName=node[1-$NODES] Name=gpu File=$LAB/dev/nvidia[0-$((GPUS - 1))]" >"$LAB/gres.conf"
    for ((node = 0; node < GPUS; node++)); do
      ln -s /dev/null "$LAB/dev/nvidia$node"
    done
  fi
  for ((node = 1; node <= NODES; node++)); do
    mkdir "$LAB/spool/node$node"
    echo "127.0.0.1 node$node" >>"$LAB/hosts"
    echo "NodeName=node$node NodeHostname=$([ -e "$LAB/isolated" ] && echo "node$node" || echo "$host")" \
      "NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$CPUS RealMemory=$MEMORY" \
      "$( ((GPUS == 0)) || echo "Gres=gpu:$GPUS")" >>"$SLURM_CONF"
  done
  # Jobs in urgent preempt and requeue those in main.
  {
    echo "PreemptType=preempt/partition_prio"
    echo "PreemptMode=REQUEUE"
    echo "SlurmctldParameters=preempt_send_user_signal"
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=5"
    echo "PartitionName=brief Nodes=ALL MaxTime=2 DefaultTime=1 PriorityTier=1"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 PriorityTier=2 PreemptMode=OFF"
  } >>"$SLURM_CONF"
}

start_node() { # N
  local node=node$1
  if [ -e "$LAB/isolated" ]; then
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid unshare --mount --uts --pid --fork --kill-child=SIGKILL --mount-proc bash -c '
      hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; slurmd -D -N "$1" & wait
    ' - "$node" "$LAB" </dev/null >>"$LAB/log/$node.out" 2>&1 &
    echo $! >"$LAB/pid/$node"
    disown
  else
    slurmd -N "$node"
    wait_for 10 "$node" running "$LAB/pid/$node"  # the daemon writes its pid file after it has forked
  fi
}

descendants() { # PID...
  local pid
  for pid in "$@"; do
    echo "$pid"
    # shellcheck disable=SC2046  # a list of numbers
    descendants $(pgrep -P "$pid")
  done
}

step_daemons() { # NODE: print the processes that listen on sockets in the node's spool folder, one per job step
  local inode
  awk -v folder="$LAB/spool/$1/" 'index($8, folder) == 1 { print $7 }' /proc/net/unix | while read -r inode; do
    find /proc/[0-9]*/fd -lname "socket:\[$inode\]" 2>/dev/null | cut -d/ -f3 || true
  done | sort -u
}

kill_node() { # N
  local node=node$1
  # An isolated node dies with the first process of its namespace; otherwise jobs survive the node's daemon.
  ! running "$LAB/pid/$node" || kill -KILL "$(cat "$LAB/pid/$node")"
  # shellcheck disable=SC2046  # a list of numbers
  kill -KILL $(descendants $(step_daemons "$node")) 2>/dev/null || true
  rm -f "$LAB/pid/$node"
}

nodes_idle() { [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "$NODES" ]; }

nodes_known() { ! sinfo -h -N -o %T | grep -q unk; }

start() {
  local node
  ! running "$LAB/pid/slurmctld" || die "a cluster is running in $LAB; stop it first"
  [ -e "$LAB/.slurm-lab" ] || [ -z "$(ls -A "$LAB" 2>/dev/null)" ] ||
    die "$LAB contains other files; choose a new folder: LAB=..."
  [[ $LAB != *[[:space:]]* ]] || die "Slurm allows no spaces in paths; choose another folder: LAB=/tmp/lab"
  stop  # what a killed controller or start has left
  rm -rf "$LAB"
  configure
  # --force: munge refuses to run as root and in folders that others cannot enter.
  munged --force --key-file="$LAB/munge.key" --socket="$SOCKET" --pid-file="$LAB/pid/munged" --num-threads=2 \
    --log-file="$LAB/log/munged" --seed-file="$LAB/munge.seed" 2>>"$LAB/log/munged.out"
  wait_for 10 munge munge -S "$SOCKET" -n
  slurmctld -i
  wait_for 20 slurmctld scontrol ping
  for ((node = 1; node <= NODES; node++)); do
    start_node "$node"
  done
  wait_for 30 "node1 to node$NODES" nodes_idle
}

stop() {
  local file
  for file in "$LAB"/spool/node*; do
    [ ! -e "$file" ] || kill_node "${file##*/node}"
  done
  for file in "$LAB"/pid/{slurmctld,munged}; do
    ! running "$file" || kill -KILL "$(cat "$file")"
    rm -f "$file"
  done
}

case "${1:-} ${2:-}" in
  "start ") start ;;
  "stop ") stop ;;
  "env ") printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" ;;
  "kill-node "[1-9]*)
    kill_node "$2"
    # Slurm would notice by itself only after minutes.
    scontrol update "nodename=node$2" state=down reason=crashed
    ;;
  "start-node "[1-9]*)
    start_node "$2"
    scontrol update "nodename=node$2" state=resume
    ;;
  "restart-controller " | "kill-controller ")
    kill "$([ "$1" = kill-controller ] && echo -KILL || echo -TERM)" "$(cat "$LAB/pid/slurmctld")"
    sleep 3
    slurmctld
    wait_for 20 slurmctld scontrol ping
    wait_for 60 "the nodes" nodes_known
    ;;
  *) die "usage: lab.sh start|stop|env|kill-node N|start-node N|restart-controller|kill-controller" ;;
esac
