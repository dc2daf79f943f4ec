#!/usr/bin/env bash
# Train on several machines without SLURM: give the same command on each of them.
#
#   launch/multinode.sh NODES HEAD --config configs/paper2012.yaml --data.root IMAGENET
#
#   NODES   how many machines; 2:4: start with two, and let two more join
#   HEAD    the host name of one of them
#
# All of them need this package, the images, and one folder for runs (--run.output_dir on a disk that
# they share). If a process dies, all restart from the last checkpoint, up to RESTARTS times (3); if a
# machine other than HEAD is lost, the others do, where NODES allows fewer (1:4), and the same command
# has it join them again. If HEAD is lost, the command ends on all. A signal to any of them and
# `touch RUN/PREEMPT` save the run and end it everywhere; the same commands resume it.
#
# Read from the environment:
#   PROCESSES   processes on this machine (as many as it has GPUs, or 1)
#   RESTARTS    see above
#   PORT        of HEAD, for the rendezvous (29400); each run at a time needs its own
#   INTERFACE   the network, where a machine has several (`ip address` lists them: ib0, eth0)
#   PYTHON      the interpreter (python)
# and set for the processes:
#   OMP_NUM_THREADS=1   as torchrun would, with a warning; the trainer sets its threads itself
#                       (--runtime.threads)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   INTERFACE, if it is given; else each library takes the
#                       first that it finds, which other machines may not reach
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1   so that a machine that comes back can join (torch 2.14)
#   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT   by torchrun
set -eu
if [ $# -lt 2 ] || [ "${1#--}" != "$1" ] || [ "${2#--}" != "$2" ]; then
    echo "give the number of machines, the first one's name and the trainer's options:" \
        "launch/multinode.sh 2 HOST --config configs/paper2012.yaml --data.root IMAGENET" >&2
    exit 2
fi
nodes=$1 head=$2
shift 2
processes=1
if nvidia-smi --list-gpus 2>/dev/null | grep -q ^GPU; then
    processes=gpu # those that CUDA_VISIBLE_DEVICES leaves
fi
export OMP_NUM_THREADS=1
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
fi
# else a machine that comes later waits in vain for an address that only a run's first machines tell
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# with SIGUSR2: a torchrun that does not handle it dies of it, and leaves its processes
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$nodes" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:${PORT:-29400}" --rdzv-id=alexnet_dist \
    --nproc-per-node="${PROCESSES:-$processes}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \
    -m alexnet_dist.train "$@"
