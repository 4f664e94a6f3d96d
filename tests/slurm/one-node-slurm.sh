#!/usr/bin/env bash
# A real SLURM cluster of one node on this machine, for tests and for trying the cluster profile.
#
#   eval "$(tests/slurm/one-node-slurm.sh up [DIR])"   start it; prints the line that points sbatch and squeue to it
#   tests/slurm/one-node-slurm.sh status [DIR]         nodes and jobs; succeeds only if the node takes jobs
#   tests/slurm/one-node-slurm.sh down [DIR]           cancel its jobs and stop it; its log/ stays
#
# Everything lives in DIR (default: /tmp/one-node-slurm), ports are free ones, and nothing in /etc is used: clusters in
# different directories do not meet. Missing programs are installed with apt-get, which needs root and Debian or a relative;
# where that is impossible the status is 3. No systemd, no cgroups, no database: sacct does not work here.
#
# Partitions: main (default), gpu, and scavenge, whose jobs are pre-empted and queued again. The node claims CPUS (default: 4)
# and 64 GB, whatever the machine has, and one GPU of type "fake", which 4 jobs can share (gres shard).
set -euo pipefail
export LC_ALL=C PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:$PATH"
umask 022

action=${1:-}
DIR=${2:-/tmp/one-node-slurm}
CPUS=${CPUS:-4}
LOG=$DIR/log RUN=$DIR/run
NODE=$(uname -n)
NODE=${NODE%%.*} # as slurmctld and slurmd shorten their own name
USER_NAME=$(id -un)
export SLURM_CONF=$DIR/slurm.conf

say() { printf 'one-node-slurm: %s\n' "$*" >&2; }
die() {
  say "$1"
  exit "${2:-1}"
}

# RUN/NAME.started holds "PID STARTTIME" of a daemon. The start time, field 22 of /proc/PID/stat, keeps `down` from ending
# a stranger who got the same pid.
start_time() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
state_of() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -c1; }

find_daemon() { # find_daemon NAME: print the pid if the daemon runs
  local pid started
  [ -r "$RUN/$1.started" ] || return 1
  read -r pid started <"$RUN/$1.started" || return 1
  [ "$(start_time "$pid")" = "$started" ] && [ "$(state_of "$pid")" != Z ] || return 1
  printf '%s\n' "$pid"
}

launch() { # launch NAME COMMAND...: a program that goes into the background and writes RUN/NAME.pid
  local name=$1 pid
  shift
  if find_daemon "$name" >/dev/null; then return 0; fi
  rm -f "$RUN/$name.pid"
  # a daemon must keep neither the caller's pipes nor our lock
  setsid "$@" </dev/null >>"$LOG/$name.out" 2>&1 9>&- || fail_start "$name"
  for _ in $(seq 150); do
    pid=$(tr -dc 0-9 2>/dev/null <"$RUN/$name.pid") || pid=
    if [ -n "$pid" ] && [ -d "/proc/$pid" ]; then
      printf '%s %s\n' "$pid" "$(start_time "$pid")" >"$RUN/$name.started"
      return 0
    fi
    sleep 0.1
  done
  fail_start "$name"
}

fail_start() {
  tail -n 15 "$LOG/$1.out" "$LOG/$1.log" >&2 2>/dev/null || true
  die "$1 did not start; see $LOG"
}

halt() { # halt NAME: SIGTERM, and SIGKILL after 15 s
  local pid
  if pid=$(find_daemon "$1"); then
    kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq 150); do
      find_daemon "$1" >/dev/null || break
      sleep 0.1
    done
    if find_daemon "$1" >/dev/null; then kill -KILL "$pid" 2>/dev/null || true; fi
  fi
  rm -f "$RUN/$1.started"
}

port_is_taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

find_port() { # below the range from which the kernel takes ports by itself
  local port
  for _ in $(seq 100); do
    port=$((20000 + RANDOM % 10000))
    if [ "$port" != "${1:-}" ] && ! port_is_taken "$port"; then
      printf '%s\n' "$port"
      return 0
    fi
  done
  die 'found no free port'
}

install_slurm() {
  local program missing=() policy=/usr/sbin/policy-rc.d made='' log=$LOG/apt.log
  for program in munged slurmctld slurmd sbatch squeue; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "${missing[*]} not found, and there is no apt-get to install SLURM with" 3
  [ "$(id -u)" = 0 ] || die "${missing[*]} not found, and only root can install SLURM" 3
  say 'installing SLURM'
  # keeps the packages from starting daemons that have no configuration yet
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    made=1
  fi
  apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0 \
      -o DPkg::Lock::Timeout=120 munge slurm-client slurmctld slurmd </dev/null >>"$log" 2>&1 9>&-
  }
  local status=0
  apt_install || { apt-get update </dev/null >>"$log" 2>&1 9>&- && apt_install; } || status=$?
  [ -z "$made" ] || rm -f $policy
  if [ "$status" != 0 ]; then
    tail -n 15 "$log" >&2
    die 'apt-get could not install SLURM' 3
  fi
}

# SLURM resolves names with AI_ADDRCONFIG, which finds nothing where 127.0.0.1 is the only address (a sandbox without a
# network). A second loopback address cures it; it is harmless and stays.
add_loopback_address() {
  if awk '/^ *\|-- /{ip=$2} /\/32 host LOCAL/{print ip}' /proc/net/fib_trie 2>/dev/null | grep -qvx '127\.0\.0\.1'; then
    return 0
  fi
  ip addr add 127.0.0.2/8 dev lo || die 'SLURM needs an address besides 127.0.0.1, and 127.0.0.2 cannot be added' 3
}

is_loopback() { # does the node's name lead to loopback addresses alone?
  local addresses
  addresses=$(getent ahosts "$NODE" | awk '{print $1}' | sort -u) || return 1
  [ -n "$addresses" ] && ! grep -qvE '^(127\.|::1$)' <<<"$addresses"
}

write_configuration() {
  local port_ctld port_slurmd comm=''
  port_ctld=$(find_port)
  port_slurmd=$(find_port "$port_ctld")
  # a device file is what makes SLURM set CUDA_VISIBLE_DEVICES
  printf 'AutoDetect=off\nNodeName=%s Name=gpu Type=fake File=/dev/null\nNodeName=%s Name=shard Count=4 File=/dev/null\n' \
    "$NODE" "$NODE" >"$DIR/gres.conf"
  # without these the daemons listen on all addresses; with them a node name that leads nowhere breaks them
  if is_loopback; then comm=CommunicationParameters=NoInAddrAny,NoCtldInAddrAny; fi
  cat >"$SLURM_CONF" <<END
ClusterName=onenode
SlurmctldHost=$NODE(127.0.0.1)
SlurmctldPort=$port_ctld
SlurmdPort=$port_slurmd
SlurmUser=$USER_NAME
SlurmdUser=$USER_NAME
AuthType=auth/munge
CryptoType=crypto/munge
# cred_expire is also how long a pre-empted job waits before it runs again (default: 120 s)
AuthInfo=socket=$RUN/munge.socket,cred_expire=10
$comm
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.log
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool
# no cgroups, no binding to cores
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# CPUs and memory as said here, whatever the machine has
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu,shard
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=5,bf_min_age_reserve=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# how long squeue still shows a finished job
MinJobAge=7200
# sbatch refuses what can never run, rather than letting it wait for ever
EnforcePartLimits=ALL
KillWait=5
ReturnToService=2
DefMemPerCPU=512
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.log
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=$NODE NodeHostname=$NODE NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=64000 Gres=gpu:fake:1,shard:4 State=UNKNOWN
PartitionName=main Nodes=$NODE Default=YES DefaultTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=$NODE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=$NODE DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
END
}

start_munge() {
  [ -s "$DIR/munge.key" ] || (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
  # --force: what munged thinks of the modes of parent folders becomes a warning
  launch munged munged --force --num-threads 2 --key-file "$DIR/munge.key" --socket "$RUN/munge.socket" \
    --pid-file "$RUN/munged.pid" --log-file "$LOG/munged.log" --seed-file "$RUN/munge.seed"
}

# The plugin's job step drops all SLURM_ variables before it calls srun, so srun gets its configuration from a wrapper.
write_srun() {
  mkdir -p "$DIR/bin"
  printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$(command -v srun)" >"$DIR/bin/srun"
  chmod 755 "$DIR/bin/srun"
}

node_state() { timeout 10 sinfo -h -p main -o %T 2>/dev/null </dev/null | head -n 1; }

wait_for_node() {
  local state=
  for _ in $(seq 240); do
    find_daemon slurmctld >/dev/null || fail_start slurmctld
    find_daemon slurmd >/dev/null || fail_start slurmd
    state=$(node_state) || state=
    case $state in idle | mixed | allocated) return 0 ;; esac
    sleep 0.25
  done
  die "the node takes no jobs after a minute (state: ${state:-none}); see $LOG"
}

lock() {
  exec 9>"$DIR/lock"
  flock -w 300 9 || die "another one-node-slurm.sh works on $DIR"
}

start_cluster() {
  mkdir -p "$LOG" "$RUN" "$DIR/state" "$DIR/spool"
  lock
  install_slurm
  if ! find_daemon slurmctld >/dev/null; then
    add_loopback_address
    write_configuration
  fi
  write_srun
  start_munge
  launch slurmctld slurmctld
  launch slurmd slurmd
  wait_for_node
  printf "export SLURM_CONF=%q PATH=%q:\"\$PATH\"\\n" "$SLURM_CONF" "$DIR/bin"
}

stop_cluster() {
  [ -d "$RUN" ] || return 0
  lock
  if find_daemon slurmctld >/dev/null; then
    # stopping the daemons alone would leave the jobs running
    timeout 20 scancel --user "$USER_NAME" </dev/null || true
    for _ in $(seq 80); do
      [ -n "$(timeout 10 squeue -h -t PD,R,S,CG,CF -o %A 2>/dev/null </dev/null)" ] || break
      sleep 0.25
    done
  fi
  halt slurmd
  halt slurmctld
  halt munged
}

show_cluster() {
  find_daemon slurmctld >/dev/null || die "no cluster runs in $DIR"
  timeout 15 sinfo -o '%P %a %D %T %c %m %G' </dev/null
  timeout 15 squeue -o '%i %P %j %T %M %R %k' </dev/null
  case $(node_state) in idle | mixed | allocated) ;; *) return 1 ;; esac
}

case $action in
up) start_cluster ;;
down) stop_cluster ;;
status) show_cluster ;;
*)
  sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"
  exit 2
  ;;
esac
