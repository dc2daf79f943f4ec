#!/usr/bin/env bash
# Stands in for python in tests of the batch script: takes torchrun's command line, trains nothing,
# and does what the trainer promises: status.json, checkpoints/last, PREEMPT and SIGUSR2 obeyed. The
# environment says what happens: STEPS of a tenth of a second, and then ENDS as the status, of which
# "running" is a run that is killed and "nothing" one that has not begun. The doctor before it exits
# with DOCTOR_CODE.
for word in "$@"; do
    case $word in
    alexnet_dist.doctor) exit "${DOCTOR_CODE:-0}" ;;
    --run.output_dir=*) root=${word#*=} ;;
    --run.name=*) run=$root/${word#*=} ;;
    esac
done
[ "$ENDS" != nothing ] || exit 1
mkdir -p "$run/checkpoints"

status() { # STATUS
    echo "{\"status\": \"$1\", \"step\": $step, \"wandb_id\": \"0\"}" >"$run/status.json"
}

save() {
    ln -sfn "step-$(printf %08d "$step")" "$run/checkpoints/last"
}

preempted() {
    save
    rm -f "$run/PREEMPT"
    status preempted
    exit 0
}

step=$(readlink "$run/checkpoints/last" | sed 's/step-0*//')
step=${step:-0}
status running
trap preempted USR2 TERM
while [ "$step" -lt "$STEPS" ]; do
    sleep 0.1
    step=$((step + 1))
    [ ! -f "$run/PREEMPT" ] || preempted
done
[ "$STEPS" = 0 ] || save
status "$ENDS"
[ "$ENDS" = ended ]
