#!/usr/bin/env bash
# A real SLURM of two nodes, n1 and n2, on this machine alone, as root.
#
#   tests/slurm/cluster.sh start FOLDER [GPUS]     stand-in GPUs of each node, 0 to 4
#   tests/slurm/cluster.sh node FOLDER n2          start a node's slurmd again
#   tests/slurm/cluster.sh kill-node FOLDER n2     lose a node: kill -9 of all that runs on it
#   tests/slurm/cluster.sh stop FOLDER             end all that runs on the cluster, and its daemons
#
# After start: export SLURM_CONF=FOLDER/slurm.conf, then sbatch, squeue and so on speak to it.
# Needs Debian's slurm-wlm and munge. Nothing outside FOLDER is written; it is created, and start
# on a running cluster restarts it. Its path must be short: munge's socket lies in it.
set -euo pipefail

usage() {
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
[ $# -ge 2 ] || usage
action=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
conf=$folder/slurm.conf
export SLURM_CONF=$conf
host=$(hostname -s)

# Ports of this folder's own, below those that the kernel gives to clients.
first_port=$((20000 + $(printf %s "$folder" | cksum | cut -d ' ' -f 1) % 4000 * 3))

configure() { # GPUS
    local gpus='' node
    [ "$1" -eq 0 ] || gpus="Gres=gpu:$1"
    cat >"$conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its former credentials have expired: 5 is the least
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmctldPort=$first_port
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_min_interval=500000
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
# a lost node is noticed after this many seconds, and comes back when its slurmd does
SlurmdTimeout=6
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((first_port + 1)) CPUs=8 $gpus
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((first_port + 2)) CPUs=8 $gpus
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    : >"$folder/gres.conf"
    [ "$1" -eq 0 ] || for node in n1 n2; do # a file is asked for; terminals do no harm
        echo "NodeName=$node Name=gpu File=/dev/tty[1-$1]" >>"$folder/gres.conf"
    done
}

# Process ids of this cluster, or of a node of it, by the environment of all that SLURM starts.
ours() { # [NODE]
    local environment words
    for environment in /proc/[0-9]*/environ; do
        words=$(tr '\0' '\n' <"$environment") || continue
        if grep -qx "SLURM_CONF=$conf" <<<"$words" &&
            grep -qx "SLURMD_NODENAME=${1:-.*}" <<<"$words"; then
            environment=${environment#/proc/}
            echo "${environment%/environ}"
        fi
    done 2>/dev/null
}

start_node() { # NODE
    SLURMD_NODENAME=$1 slurmd -N "$1"
}

stop() {
    local pids
    for _ in 1 2 3; do # what is killed may just have started something
        mapfile -t pids < <(ours)
        [ ${#pids[@]} -gt 0 ] || break
        kill -9 "${pids[@]}" 2>/dev/null || true
        sleep 0.2
    done
}

case $action in
start)
    stop
    rm -rf "${folder:?}"/{state,n1,n2,munge.*,*.pid,*.log}
    mkdir -p "$folder"/{state,n1,n2}
    configure "${3:-0}"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    export SLURMD_NODENAME=none # so that stop finds these two as well
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
        --pid-file="$folder/munge.pid" --log-file="$folder/munge.log" \
        --seed-file="$folder/munge.seed"
    slurmctld
    start_node n1
    start_node n2
    for _ in $(seq 150); do
        if [ "$(sinfo --noheader --Node --format=%T 2>/dev/null | grep -c idle)" = 2 ]; then
            exit 0
        fi
        sleep 0.2
    done
    echo "the nodes have not come up in 30 seconds; see $folder/*.log" >&2
    exit 1
    ;;
node) start_node "$3" ;;
kill-node)
    mapfile -t pids < <(ours "$3")
    kill -9 "${pids[@]}"
    ;;
stop) stop ;;
*) usage ;;
esac
