
# --- From here on the script is the same for every array (lab/fleet/slurm_task.sh). One task is one night,
# or one worker of a team, in its own work directory, $scratch/autoresearch/TAG/TASK, which holds
#   tree/    a clone on the branch autoresearch/TAG-TASK: results.tsv, runs.jsonl, runs/, run.log, night.log
#   home/    HOME of the task, private; cache/: compiled graphs and other caches
#   deadline-JOB    when the hours are over, in seconds since 1970; job: the Slurm job that is running here
# A second start, after preemption, a lost node or a time limit, finds all of this and resumes.

set -euo pipefail
umask "$mask"

task=${SLURM_ARRAY_TASK_ID:?this is one task of an array: submit it with sbatch}
work=$scratch/autoresearch/$tag/$task
tree=$work/tree

say() { printf '%s task %s: %s\n' "$(date '+%F %T')" "$task" "$*"; }
fail() { say "$*" >&2 && exit 1; }

mkdir -p "$work"/cache "$work"/home
chmod 700 "$work"/home
owner=$(cat "$work/job" 2> /dev/null || true)
if [ -n "$owner" ] && [ "$owner" != "$SLURM_JOB_ID" ] &&
    [ -n "$(squeue --noheader --jobs="$owner" --states=running,suspended,completing --format=%i 2> /dev/null)" ]; then
    fail "job $owner is running in $work: wait for its end, or scancel it"
fi
echo "$SLURM_JOB_ID" > "$work/job"

# --- The hours count from the first start, so that a restart does not lengthen the night.

deadline=$work/deadline-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}
if [ ! -s "$deadline" ]; then
    echo $(($(date +%s) + seconds)) > "$deadline.new"
    mv "$deadline.new" "$deadline"
fi
left() { echo $(($(cat "$deadline") - $(date +%s))); }
if [ "$(left)" -le 0 ]; then
    say "the hours are over"
    exit 0
fi

# --- Slurm's TERM: the time limit is near, or the task is preempted. The training prints "preempted". If hours are left
# and Slurm will not start this task again by itself, the task requeues itself.

night=
# shellcheck disable=SC2329 # the trap calls it
stop() {
    trap '' TERM
    say "TERM: the night ends here"
    if [ -n "$night" ]; then
        for _ in {1..15}; do # Slurm may have signalled it already; a second TERM would cut its shutdown short
            if kill -0 "$night" 2> /dev/null; then sleep 0.2; fi
        done
        kill -TERM "$night" 2> /dev/null || true
        wait "$night" || true
    fi
    # A task that is being requeued or cancelled is no longer RUNNING.
    if [ "$(left)" -gt 0 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T 2> /dev/null)" = RUNNING ]; then
        say "$(left) s of the night are left: back into the queue"
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued: submit the script again to resume"
    fi
    exit 143
}
trap stop TERM

# --- The working tree: made under a temporary name and renamed once it is complete.

if [ ! -d "$tree" ]; then
    program=${programs[task]:?there is no program for this task}
    rm -rf "$work"/new-*
    new=$work/new-$SLURM_JOB_ID
    git clone --quiet --no-checkout "$source" "$new"
    git -C "$new" checkout --quiet -B main "$commit"
    git -C "$new" config user.name "$(git -C "$source" config user.name || echo autoresearch)"
    git -C "$new" config user.email "$(git -C "$source" config user.email || echo autoresearch@localhost)"
    cp "$program" "$new/program.md"
    [ -z "$from" ] || cp "$from/runs/best/train.py" "$new/train.py"
    if ! git -C "$new" diff --quiet; then
        git -C "$new" -c commit.gpgsign=false \
            commit --quiet -m "task $task: $(basename "$program")${from:+, train.py from $from}" -- program.md train.py
    fi
    if [ -n "$team" ]; then
        git -C "$new" config autoresearch.team "$team"
        git -C "$new" config autoresearch.remote "$remote"
    fi
    git -C "$new" switch --quiet -c "autoresearch/$tag-$task"
    for settings in .claude .codex .agents; do # the agent's, which git does not carry; without Claude Code's own trees
        [ -d "$source/$settings" ] || continue
        [ ! -L "$new/$settings" ] || rm "$new/$settings" # a link, which may lead nowhere from here
        mkdir -p "$new/$settings"
        { tar -C "$source/$settings" --exclude=worktrees -cf - . || [ $? -eq 1 ]; } | # 1: a file changed meanwhile
            tar -C "$new/$settings" -xf -
    done
    mv "$new" "$tree"
fi
cd "$tree"
branch=$(git symbolic-ref --short HEAD)
[ "$branch" = "autoresearch/$tag-$task" ] || fail "$tree is on $branch: git switch autoresearch/$tag-$task"

# --- Nothing is written to the user's own home, and no network is needed. If the agent's login is stored in that home,
# start it as `HOME=$REAL_HOME agent ...`.

export REAL_HOME=$HOME HOME=$work/home
export XDG_CACHE_HOME=$work/cache XDG_CONFIG_HOME=$HOME/.config XDG_DATA_HOME=$HOME/.local/share
export XDG_STATE_HOME=$HOME/.local/state UV_CACHE_DIR=$work/cache/uv MPLCONFIGDIR=$work/cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR=$work/cache/inductor TRITON_CACHE_DIR=$work/cache/triton CUDA_CACHE_PATH=$work/cache/cuda
export UV_OFFLINE=1 UV_NO_SYNC=1 UV_PYTHON_DOWNLOADS=never HF_HUB_OFFLINE=1 HF_HUB_CACHE=$hub_cache
export AUTORESEARCH_DATASET=$dataset AUTORESEARCH_CACHE=$data OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
unset VIRTUAL_ENV PYTHONPATH HF_HOME

if [ -n "$copy" ]; then
    local_data=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/autoresearch-$SLURM_JOB_ID
    trap 'rm -rf "$local_data"' EXIT
    rm -rf "$local_data" # half a copy, if this job was killed on this node before
    mkdir -p "$(dirname "$local_data/$copy")"
    if cp -R "$data/$copy" "$local_data/$copy"; then
        AUTORESEARCH_CACHE=$local_data
    else
        rm -rf "$local_data"
        say "the data do not fit into $local_data: reading them from $data"
    fi
fi

if [ -n "$container" ]; then
    runtime=$(command -v apptainer || command -v singularity) || fail "there is no apptainer on this node: module load it"
    unset UV_PROJECT_ENVIRONMENT
    binds=(--bind "$work" --bind "$AUTORESEARCH_CACHE:$AUTORESEARCH_CACHE:ro")
    [ ! -d "$remote" ] || binds+=(--bind "$remote")
    [ ! -d "$hub_cache" ] || binds+=(--bind "$hub_cache:$hub_cache:ro")
    python=("$runtime" exec --nv --home "$HOME" "${binds[@]}" --pwd "$tree" "$container" python)
else
    export UV_PROJECT_ENVIRONMENT=$environment PATH=$environment/bin:${uv:+$uv:}$PATH
    command -v uv > /dev/null || fail "there is no uv on this node: put it on PATH before sbatch"
    python=("$environment/bin/python")
fi

# --- The night.

hours=$(awk -v s="$(left)" 'BEGIN { printf "%.5f", s / 3600 }')
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $(hostname), $hours hours left, in $tree"
if [ -n "$agent" ]; then
    "${python[@]}" -m lab night --hours "$hours" --agent "$agent" &
else
    "${python[@]}" -m lab work --hours "$hours" &
fi
night=$!
rc=0
wait "$night" || rc=$?
"${python[@]}" -m lab status || true
exit "$rc"
