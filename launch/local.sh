#!/usr/bin/env bash
# Train on this machine alone, by a process on each of its GPUs.
#
#   launch/local.sh --config configs/imagenette.yaml --data.root DIR
#   PROCESSES=2 launch/local.sh --config ...      so many, on GPUs or on processors
#
# A process that dies has all of them start again from the last checkpoint, RESTARTS times (3); for
# torchrun all ends are alike, so that what is wrong with an option is said as often. Ctrl-C, `kill`
# and `touch RUN/PREEMPT` save the run and end it, and nothing starts it again but the same line.
#
# What is read from the environment:
#   PROCESSES   processes (as many as there are GPUs, or 1)
#   RESTARTS    see above
#   PYTHON      the interpreter (python)
# and what is set in it for the processes:
#   OMP_NUM_THREADS=1   what torchrun would set, with a warning; the trainer shares the machine's
#                       processors out itself (--runtime.threads, --data.threads)
#   RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT   by torchrun; the port
#                       is a free one, so that several runs can share a machine
set -eu
processes=1
if nvidia-smi --list-gpus 2>/dev/null | grep -q ^GPU; then
    processes=gpu # those that CUDA_VISIBLE_DEVICES leaves
fi
export OMP_NUM_THREADS=1
# SIGUSR2 among the signals, for without it a torchrun that gets one dies and leaves its processes
exec "${PYTHON:-python}" -m torch.distributed.run --standalone \
    --nproc-per-node="${PROCESSES:-$processes}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 \
    -m alexnet_dist.train "$@"
