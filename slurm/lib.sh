# shellcheck shell=bash
# What the batch scripts share.
#
# What a cluster may need. A job has the environment of the shell that submits it, so it is enough to
# load and export there:
#
# Modules     module load cuda/13.0
# Network     export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#             if nodes have several, and the first one found does not reach the others
# Container   export SRUN_OPTIONS='--container-image=IMAGE --container-mounts=IMAGENET,RUNS' (pyxis)
#             PYTHON is then the container's; these scripts run outside of it
# Processes   export PROCESSES=2: on each node; else as many as it has GPUs, or 1
# Doctor      export DOCTOR=no: train without looking first whether that would work (half a minute)
python=${PYTHON:-python}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
read -ra srun_options <<<"${SRUN_OPTIONS:-}"

# A job is not requeued after so many starts in a row without a new checkpoint.
MAX_STARTS=3

log() { # MESSAGE...
    printf '%(%F %T)T slurm: %s\n' -1 "$*"
}

option() { # NAME DEFAULT WORDS...: an option's value in a command line
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

free_port() { # HOST NUMBER: of eight ports chosen by NUMBER, the first that nobody on HOST listens on
    local low=32768 high=60999 first count port try
    # not in the range from which the kernel gives clients their ports at any time
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

launch() { # MODULE WORDS...: run torchrun on each node and wait for all; srun's exit code
    local rendezvous=(--standalone) host port
    if [ "$SLURM_NNODES" -gt 1 ]; then
        host=$(hostname) # a batch script runs on the job's first node
        if ! port=$(free_port "$host" "$SLURM_JOB_ID"); then
            log "the ports of $host for job $SLURM_JOB_ID are all in use:" \
                "submit it again, since a job with another id uses others"
            exit 1
        fi
        rendezvous=(
            "--nnodes=$SLURM_NNODES" --rdzv-backend=c10d "--rdzv-endpoint=$host:$port"
            "--rdzv-id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
        )
        # a node that does not come is what it is to find
        [ "$1" != alexnet_dist.doctor ] || rendezvous+=(--rdzv-conf=join_timeout=120)
    fi
    log "job $SLURM_JOB_ID starts on $SLURM_JOB_NODELIST," \
        "$processes processes per node, torchrun ${rendezvous[*]}"
    export OMP_NUM_THREADS=1 # torchrun would set it and warn; the trainer sets its threads itself
    # A torchrun that was told to end exits with 1 even if all is well, so that must not kill the
    # others; but they must not wait forever for a lost one.
    # Since SLURM 22.05 srun does not inherit --cpus-per-task from the job.
    srun --export=ALL --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=120 \
        "${srun_options[@]}" "$python" -m torch.distributed.run "${rendezvous[@]}" \
        --nproc-per-node="$processes" \
        --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 -m "$@" &
    srun=$!
    while kill -0 "$srun" 2>/dev/null; do
        wait "$srun" # returns after the trap of a signal; srun is still running then
    done
    wait "$srun"
}

doctor() { # WORDS...: print the doctor's page of these nodes; not 0 where something fails
    local noise code
    noise=$(mktemp)
    launch alexnet_dist.doctor "$@" 2>"$noise"
    code=$?
    # torchrun prints a hundred lines about a process that has failed: one of ours says it
    grep '^alexnet_dist: ' "$noise" || cat "$noise"
    rm -f "$noise"
    return "$code"
}

# Training over as many requeues of the job as it takes

train() { # WORDS...: train until the run is finished; requeue the job if it is stopped before
    local output_dir id=$SLURM_JOB_ID
    output_dir=$(option run.output_dir runs "$@")
    name=$(option run.name '' "$@")
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        id=$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID
        name=${name:+$name-$SLURM_ARRAY_TASK_ID}
    fi
    name=${name:-$SLURM_JOB_NAME-$id}
    run=$output_dir/$name
    to_resume="--run.output_dir=$output_dir --run.name=$name resumes it"
    terminated='' saving=''
    trap on_time_limit USR2
    trap on_sigterm TERM
    if [ "$(status)" = ended ]; then
        log "the run in $run is finished already"
        [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] # as when a node was lost at the very end
        exit
    fi
    count_starts
    export_end_time
    if [ "${DOCTOR:-yes}" != no ]; then
        doctor --quick "$@" --run.output_dir="$output_dir" --run.name="$name"
        code=$?
        [ -z "$saving$terminated" ] || finish_job
        [ "$code" -eq 0 ] || refuse
    fi
    while :; do
        before=$(last_checkpoint)
        launch alexnet_dist.train "$@" --run.output_dir="$output_dir" --run.name="$name"
        code=$?
        if [ "$(status)" != running ] || [ "$(last_checkpoint)" = "$before" ] ||
            [ -n "$terminated$saving" ]; then
            break
        fi
        log "the run in $run was lost (srun exited with $code) after new checkpoints:" \
            "it is restarted on the same nodes"
    done
    finish_job
}

status() { # the run's status; nothing if there is no run
    sed -n 's/.*"status": *"\([a-z]*\)".*/\1/p' "$run/status.json" 2>/dev/null
}

last_checkpoint() {
    readlink "$run/checkpoints/last" || echo none
}

count_starts() { # those before this one, in a row, that brought no new checkpoint
    local last=none
    at_start=$(last_checkpoint) futile=0
    if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
        rm -f "$run/.starts" # of an earlier job
        return
    fi
    [ ! -f "$run/.starts" ] || read -r last futile <"$run/.starts"
    if [ "$at_start" = "$last" ]; then
        futile=$((futile + 1))
    else
        futile=0
    fi
    mkdir -p "$run" && echo "$at_start $futile" >"$run/.starts"
    [ "$futile" -lt "$MAX_STARTS" ] || give_up # SLURM itself requeues a job that lost a node
}

export_end_time() { # of the job, in seconds, for the trainer; older SLURMs do not set it
    local end
    [ -z "${SLURM_JOB_END_TIME:-}" ] || return
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e)
    if end=$(date --date="$end" +%s 2>/dev/null); then
        export SLURM_JOB_END_TIME=$end
    fi
}

on_time_limit() { # SLURM's signal shortly before it; a file reaches the trainer on any node
    log "the job is close to its time limit: the run is told to save"
    saving=yes
    while kill -0 "$srun" 2>/dev/null; do # again: a run that is just starting removes an old file
        [ ! -d "$run" ] || touch "$run/PREEMPT"
        sleep 5
    done &
}

on_sigterm() { # SLURM sends it to the trainer, too
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r)" != TimeLimit ]; then
        terminated=yes
    fi
}

finish_job() { # after srun: exit, or requeue the job
    trap '' TERM # scontrol requeue sends it
    rm -f "$run/PREEMPT"
    case $(status) in
    ended)
        log "the run in $run is finished"
        exit 0
        ;;
    stopped)
        log "the run in $run has stopped"
        exit 0
        ;;
    failed)
        log "the run in $run has failed: fix the cause, which is given above"
        exit 1
        ;;
    preempted) requeue "is saved, to be restarted" ;;
    running) requeue "was lost (srun exited with $code)" ;;
    *)
        log "the run in $run has not begun; the cause is given above"
        exit 1
        ;;
    esac
}

refuse() { # what the doctor has found would fail on these nodes again and again
    log "job $SLURM_JOB_ID ends before it trains: fix what fails above, and submit it again" \
        "(export DOCTOR=no trains all the same)"
    exit 1
}

requeue() { # WHAT happened to the run
    if [ -n "$terminated" ]; then # SLURM requeues it itself after a lost node, not after scancel
        log "the run in $run $1, and SLURM ends this job: $to_resume"
        exit 1
    fi
    if [ "$(last_checkpoint)" = "$at_start" ] && [ $((futile + 1)) -ge "$MAX_STARTS" ]; then
        give_up
    fi
    log "the run in $run $1: job $SLURM_JOB_ID is requeued"
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        log "job $SLURM_JOB_ID could not be requeued: $to_resume"
        exit 1
    fi
    exit 0
}

give_up() {
    log "the run in $run was started $MAX_STARTS times without a new checkpoint (the last is" \
        "$at_start): job $SLURM_JOB_ID gives up; fix the cause, which is given above; $to_resume"
    exit 1
}
