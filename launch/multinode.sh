#!/usr/bin/env bash
# Train on several machines that no SLURM rules: give the same line on each of them.
#
#   launch/multinode.sh NODES HEAD --config configs/paper2012.yaml --data.root IMAGENET
#
#   NODES   how many machines; 2:4: begin with two, and let two more join
#   HEAD    the name of one of them, under which the others reach it
#
# All of them need this package, the images, and one folder for runs (--run.output_dir on a disk that
# they share). A process that dies has all of them start again from the last checkpoint, RESTARTS
# times (3); a machine other than HEAD that is lost has the others do so where NODES allows for
# fewer (1:4). A signal to any of them and `touch RUN/PREEMPT` save the run and end it everywhere;
# the same lines go on with it.
#
# What is read from the environment:
#   PROCESSES   processes on this machine (as many as it has GPUs, or 1)
#   RESTARTS    see above
#   PORT        of HEAD, where the machines meet (29400); another one for each run at a time
#   INTERFACE   the network to use, where a machine has several (ip address lists them: ib0, eth0)
#   PYTHON      the interpreter (python)
# and what is set in it for the processes:
#   OMP_NUM_THREADS=1   what torchrun would set, with a warning; the trainer shares the machine's
#                       processors out itself (--runtime.threads, --data.threads)
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME   INTERFACE, if it is given; else each library takes the
#                       first that it finds, which may be one that other machines do not reach
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
# SIGUSR2 among the signals, for without it a torchrun that gets one dies and leaves its processes
exec "${PYTHON:-python}" -m torch.distributed.run --nnodes="$nodes" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:${PORT:-29400}" --rdzv-id=alexnet_dist \
    --nproc-per-node="${PROCESSES:-$processes}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \
    -m alexnet_dist.train "$@"
