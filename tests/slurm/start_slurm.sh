#!/usr/bin/env bash
# A SLURM of one machine for tests: its controller, its node (which claims four cores) and munge, below one folder.
#
#   bash tests/slurm/start_slurm.sh start FOLDER   installs the packages where they are absent, starts, waits until idle
#   bash tests/slurm/start_slurm.sh stop FOLDER    stops what was started in FOLDER
#
# Needs root and Debian (or Ubuntu). FOLDER must be absolute and absent, and no deeper than a socket's path allows
# (a folder directly below /tmp). Nothing outside it is written but the packages; a SLURM that the machine already
# runs goes on. Afterwards, commands of this SLURM are those run with SLURM_CONF=FOLDER/slurm.conf.
set -euo pipefail

readonly CANNOT_INSTALL=3 # exit code when the machine lacks the packages and cannot get them

die() {
    printf 'error: %s\n' "$*" >&2
    exit "${code:-1}"
}

install() {
    if command -v sbatch >/dev/null && command -v slurmctld >/dev/null && command -v slurmd >/dev/null \
        && command -v munged >/dev/null; then
        return
    fi
    local code=$CANNOT_INSTALL
    command -v apt-get >/dev/null || die "SLURM is not installed, and there is no apt-get to install it with"
    export DEBIAN_FRONTEND=noninteractive
    local words=(-y --no-install-recommends -o DPkg::Lock::Timeout=60 install slurm-wlm munge)
    apt-get "${words[@]}" >/dev/null || { apt-get update >/dev/null && apt-get "${words[@]}" >/dev/null; } \
        || die "the packages slurm-wlm and munge cannot be installed"
}

free_port() { # a port that nobody listens on
    python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

write_conf() {
    local name cpus memory
    name=$(hostname -s)
    cpus=$(nproc)
    memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$name(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
ReturnToService=2
KillWait=30
InactiveLimit=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$name NodeAddr=127.0.0.1 CPUs=$((cpus < 4 ? 4 : cpus)) RealMemory=$memory State=UNKNOWN
PartitionName=test Nodes=$name Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=$name MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
CONF
}

start() {
    [ "$(id -u)" = 0 ] || die "starting SLURM needs root"
    [ ! -e "$folder" ] || die "$folder exists"
    install
    mkdir -p "$folder"/{munge,state,spool}
    chmod 755 "$folder"
    head -c 1024 /dev/urandom >"$folder/munge/key"
    chmod 400 "$folder/munge/key"
    chown -R munge: "$folder/munge"
    write_conf
    # Not by su, which would look into the user's (absent) home.
    setpriv --reuid=munge --regid=munge --clear-groups munged --key-file="$folder/munge/key" \
        --socket="$folder/munge/socket" --pid-file="$folder/munge/munged.pid" --log-file="$folder/munge/munged.log" \
        --seed-file="$folder/munge/seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N "$(hostname -s)"
    for _ in $(seq 60); do
        if sinfo --noheader --format %T 2>/dev/null | grep -q '^idle$'; then
            return
        fi
        sleep 0.5
    done
    tail -n 20 "$folder"/*.log >&2
    die "SLURM has started but its node is not idle: $(sinfo 2>&1)"
}

stop() {
    export SLURM_CONF=$folder/slurm.conf
    scancel --full --signal=KILL --user=root 2>/dev/null || true
    local pid
    for pid in slurmd.pid slurmctld.pid munge/munged.pid; do
        [ ! -e "$folder/$pid" ] || kill "$(cat "$folder/$pid")" 2>/dev/null || true
        for _ in $(seq 50); do
            if [ ! -e "$folder/$pid" ] || ! kill -0 "$(cat "$folder/$pid" 2>/dev/null)" 2>/dev/null; then
                break
            fi
            sleep 0.2
        done
    done
}

[ $# = 2 ] || die "usage: start_slurm.sh start|stop FOLDER"
folder=$2
case $1 in
start) start ;;
stop) stop ;;
*) die "expected start or stop, found $1" ;;
esac
