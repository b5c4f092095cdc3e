#!/usr/bin/env bash
# One training on a compute node, for an agent that works on the login node. It replaces train.py in program.md; the
# rest of the loop is unchanged:
#
#   uv run deploy/slurm/train-under-srun.sh > run.log 2>&1
#
# SRUN_OPTIONS: options of srun. SRUN_JOB_FILE: a file with the id of an allocation to run in (login-night.sh makes one, and
# another one if that is lost: the training waits for it). SRUN_JOB_WAIT: for how many seconds, 600 if it is not set; with the
# training this must stay below the time limit of an agent's command.
# A training locks the folder of train.py, so that `lab record` knows that it is running. Such a lock is visible on one
# machine only, on any file system. So this script holds the lock here, unless this machine is a compute node: there the
# training, which may run on this very machine, could not take it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ -z "$(sinfo --noheader --nodes="$(hostname -s)" --format=%N 2> /dev/null)" ]; then
    exec 9< .
    flock --nonblock 9 || {
        echo "another run is going on in $PWD: wait for it, or train in another checkout" >&2
        exit 1
    }
fi
read -ra options <<< "${SRUN_OPTIONS:---gres=gpu:1 --cpus-per-task=8 --mem=32G}"
minutes=$(python -c 'from constants import GRACE, TIME_BUDGET; print((TIME_BUDGET + 2 * GRACE) // 60 + 2)')
export HF_HUB_OFFLINE=1

if [ -n "${SRUN_JOB_FILE:-}" ]; then
    job=
    until=$((SECONDS + ${SRUN_JOB_WAIT:-600}))
    while [ "$SECONDS" -lt "$until" ]; do # Slurm may take a minute or more to say that it does not answer
        if [ -n "$(timeout 20 squeue --noheader --states=running --jobs="$(cat "$SRUN_JOB_FILE")" --format=%i 2> /dev/null)" ]; then
            job=$(cat "$SRUN_JOB_FILE")
            break
        fi
        sleep 10
    done
    if [ -z "$job" ]; then
        printf 'the allocation is lost, and Slurm has not granted another one yet: run this again\n\npreempted\n'
        exit 75
    fi
    options+=("--jobid=$job")
fi

# The training's output, stderr included, goes to stdout; Slurm's own messages go to a file.
mkdir -p .lab
srun --nodes=1 --ntasks=1 --time="$minutes" "${options[@]}" sh -c 'exec python train.py 2>&1' 2> .lab/srun.err &
run=$!
ended=
trap 'ended=yes; kill -TERM "$run" 2> /dev/null || true' TERM INT
rc=0
wait "$run" || rc=$?
while kill -0 "$run" 2> /dev/null; do wait "$run" || true; done # a signal ends a wait

# A run that was ended from outside (the night is over, the job cancelled, the node lost) is neither a result nor a
# crash: `preempted` is its last line, as train.py prints it. Exceeding --mem counts as a crash.
if [ "$rc" -ge 128 ] && ! grep -qi 'oom\|out of memory' .lab/srun.err; then ended=yes; fi
if [ -n "$ended" ]; then
    printf '\npreempted\n'
    exit 75
fi
[ "$rc" -eq 0 ] || cat .lab/srun.err >&2
exit "$rc"
