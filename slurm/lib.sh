# shellcheck shell=bash
# What the batch scripts share. python -m alexnet_dist.submit writes it into the script that it
# submits; a script that is submitted by hand reads it from slurm/ below the folder it is submitted
# in, as its own copy, which SLURM makes, lies elsewhere.

# What a cluster's owner may have to change. Partition, account, memory and all else that SLURM is
# asked for are words of submit or sbatch, not lines of a file; and a job has the environment of the
# shell that submits it, so what is loaded and exported there need not be repeated here.
#
# Modules     module load cuda/13.0
# Network     export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#             where nodes have several, and the first that is found does not reach the others
# Container   SRUN_OPTIONS='--container-image=IMAGE --container-mounts=IMAGENET,RUNS' (pyxis)
#             PYTHON is then the container's; these scripts themselves run outside of it
python=${PYTHON:-python}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}} # on each node
read -ra srun_options <<<"${SRUN_OPTIONS:-}"

# After so many starts in a row without a new checkpoint a job is not queued again.
LIMIT=3

say() { # SENTENCE, in one or several words
    printf '%(%F %T)T slurm: %s\n' -1 "$*"
}

option() { # NAME DEFAULT WORDS...: the value that the words give to an option
    local name=$1 value=$2
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        "--$name") value=${2-} ;;
        "--$name="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s\n' "$value"
}

free_port() { # HOST NUMBER: of eight ports that NUMBER chooses, the first on which HOST is silent
    local low=32768 high=60999 first count port try
    # the kernel gives ports of this range to whoever calls somebody: they can be taken at any time
    read -r low high </proc/sys/net/ipv4/ip_local_port_range
    if [ "$low" -gt 11000 ]; then
        first=10000 count=$((low - 10000))
    else
        first=$((high + 1)) count=$((65535 - high))
    fi
    for try in 0 1 2 3 4 5 6 7; do
        [ "$count" -gt 0 ] || return 1
        port=$((first + ($2 * 8 + try) % count))
        if ! (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null; then
            echo "$port"
            return 0
        fi
    done
    return 1
}

launch() { # MODULE WORDS...: start torchrun on each node, and wait for all; srun's exit code
    local place=(--standalone) host port srun
    if [ "$SLURM_NNODES" -gt 1 ]; then
        host=$(hostname) # a batch script runs on its job's first node
        if ! port=$(free_port "$host" "$SLURM_JOB_ID"); then
            say "the ports of $host that job $SLURM_JOB_ID may take are all in use:" \
                "submit it again, as a job of another number takes others"
            exit 1
        fi
        place=(
            "--nnodes=$SLURM_NNODES" --rdzv-backend=c10d "--rdzv-endpoint=$host:$port"
            "--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        )
    fi
    say "job $SLURM_JOB_ID begins on $SLURM_JOB_NODELIST," \
        "$processes processes on each node, torchrun ${place[*]}"
    export OMP_NUM_THREADS=1 # torchrun would set it and warn; the trainer sees to threads itself
    # A torchrun that a signal told to end ends with 1, even if all is well: this must not have the
    # others killed. But they must not wait for ever for one that is gone.
    # From SLURM 22.05 on srun no longer takes --cpus-per-task from the job.
    srun --export=ALL --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 \
        "${srun_options[@]}" "$python" -m torch.distributed.run "${place[@]}" \
        --nproc-per-node="$processes" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 -m "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" # ends when a signal comes, once its trap has run; srun goes on
    done
    wait "$srun"
}

# A run over as many lives of its job as it takes

train() { # WORDS...: train until the run has ended; if it is stopped before, queue the job again
    local root id=$SLURM_JOB_ID
    root=$(option run.output_dir runs "$@")
    name=$(option run.name '' "$@")
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        id=$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID
        name=${name:+$name-$SLURM_ARRAY_TASK_ID}
    fi
    name=${name:-$SLURM_JOB_NAME-$id}
    run=$root/$name
    goes_on="--run.output_dir=$root --run.name=$name goes on with it"
    ending='' saving=''
    trap save USR2
    trap end TERM
    if [ "$(status)" = ended ]; then
        say "the run in $run has ended already"
        [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] # as when a node was lost after all was done
        exit
    fi
    count_starts
    export_end
    while :; do
        before=$(progress)
        launch alexnet_dist.train "$@" --run.output_dir="$root" --run.name="$name"
        code=$?
        if [ "$(status)" != running ] || [ "$(progress)" = "$before" ] || [ -n "$ending$saving" ]
        then
            break
        fi
        say "the run in $run was lost in the middle (srun ended with $code), but had got on:" \
            "it is started again on the same nodes"
    done
    decide
}

status() { # how the run stands, in a word; nothing where there is none
    sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' "$run/status.json" 2>/dev/null
}

progress() { # the run's last checkpoint
    readlink "$run/checkpoints/last" || echo none
}

count_starts() { # how many before this one, in a row, brought no checkpoint
    local last=none
    begun=$(progress) fruitless=0
    if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
        rm -f "$run/.starts" # of a job before this one
        return
    fi
    [ ! -f "$run/.starts" ] || read -r last fruitless <"$run/.starts"
    if [ "$begun" = "$last" ]; then
        fruitless=$((fruitless + 1))
    else
        fruitless=0
    fi
    mkdir -p "$run" && echo "$begun $fruitless" >"$run/.starts"
    [ "$fruitless" -lt "$LIMIT" ] || give_up # SLURM queues a job again itself if a node is lost
}

export_end() { # when SLURM will end the job, in seconds, for the trainer; old SLURMs do not say it
    local ends
    [ -z "${SLURM_JOB_END_TIME:-}" ] || return
    ends=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)
    if ends=$(date --date="$ends" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=$ends
    fi
}

save() { # on SLURM's signal that the time is nearly over; a file reaches the trainer on any node
    say "the job's time is nearly over: the run is told to save"
    saving=yes
    while kill -0 "$srun" 2>/dev/null; do # a run that only begins takes the file for an old one
        [ ! -d "$run" ] || touch "$run/PREEMPT"
        sleep 5
    done &
}

end() { # on SIGTERM; SLURM sends it to the trainer too
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r)" != TimeLimit ]; then
        ending=yes
    fi
}

decide() { # what is left to do when srun has ended
    local stands
    stands=$(status)
    trap '' TERM # scontrol requeue sends it
    rm -f "$run/PREEMPT"
    case $stands in
    ended | stopped)
        say "the run in $run has $stands"
        exit 0
        ;;
    failed)
        say "the run in $run has failed for a reason that is given above, and must be seen to"
        exit 1
        ;;
    preempted) queue_again "is saved and waits to be started again" ;;
    running) queue_again "was lost in the middle (srun ended with $code)" ;;
    *)
        say "the run in $run has not begun; the reason is given above"
        exit 1
        ;;
    esac
}

queue_again() { # HOW the run stands
    if [ -n "$ending" ]; then # SLURM queues it again itself after a lost node, not after scancel
        say "the run in $run $1, and SLURM ends this job: $goes_on"
        exit 1
    fi
    if [ "$(progress)" = "$begun" ] && [ $((fruitless + 1)) -ge "$LIMIT" ]; then
        give_up
    fi
    say "the run in $run $1: job $SLURM_JOB_ID is queued again"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "job $SLURM_JOB_ID could not be queued again: $goes_on"
        exit 1
    fi
    exit 0
}

give_up() {
    say "the run in $run has been started $LIMIT times without a new checkpoint (its last one is" \
        "$begun), and job $SLURM_JOB_ID gives up: mend the cause, which is given above; $goes_on"
    exit 1
}
