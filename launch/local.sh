#!/usr/bin/env bash
# Train on this machine, with one process per GPU.
#
#   launch/local.sh --config configs/imagenette.yaml --data.root DIR
#   PROCESSES=2 launch/local.sh --config ...      two processes, on GPUs or CPUs
#
# If a process dies, all restart from the last checkpoint, up to RESTARTS times (3). Ctrl-C, `kill` and
# `touch RUN/PREEMPT` save the run and end it; the same command resumes it.
#
# Read from the environment:
#   PROCESSES   processes (as many as there are GPUs, or 1)
#   RESTARTS    see above
#   PYTHON      the interpreter (python)
# and set for the processes:
#   OMP_NUM_THREADS=1   as torchrun would, with a warning; the trainer sets its threads itself
#                       (--runtime.threads)
#   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT   by torchrun, with a
#                       free port, so that several runs can share a machine
set -eu
processes=1
if nvidia-smi --list-gpus 2>/dev/null | grep -q ^GPU; then
    processes=gpu # those that CUDA_VISIBLE_DEVICES leaves
fi
export OMP_NUM_THREADS=1
# with SIGUSR2: a torchrun that does not handle it dies of it, and leaves its processes
exec "${PYTHON:-python}" -m torch.distributed.run --standalone \
    --nproc-per-node="${PROCESSES:-$processes}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \
    -m alexnet_dist.train "$@"
