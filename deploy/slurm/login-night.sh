#!/usr/bin/env bash
# Step 2, if compute nodes have no internet: the agent works here, on the login node, and only the training runs on a
# compute node, which is allocated once for the whole night. Start it in tmux. The same TAG again resumes the night.
#
#   deploy/slurm/login-night.sh TAG HOURS 'AGENT COMMAND' [PROGRAM]
#
# It makes a clone in $SCRATCH/autoresearch/TAG/login/tree, in which every run command calls train-under-srun.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=deploy/slurm/site.sh
. deploy/slurm/site.sh

tag=${1:?TAG} hours=${2:?HOURS} agent=${3:?AGENT COMMAND} program=${4:-program.md}
source=$PWD
work=$SCRATCH/autoresearch/$tag/login
mkdir -p "$work"

if [ ! -d "$work/tree" ]; then
    rm -rf "$work"/new-*
    new=$work/new-$$
    git clone --quiet "$source" "$new"
    git -C "$new" checkout --quiet -B main "$(git rev-parse HEAD)"
    cp "$program" "$new/program.md"
    for settings in .claude .codex .agents; do # the agent's, which git does not carry; without Claude Code's own trees
        [ -d "$settings" ] || continue
        [ ! -L "$new/$settings" ] || rm "$new/$settings" # a link to the user's own, which sed below would change
        mkdir -p "$new/$settings"
        { tar -C "$settings" --exclude=worktrees -cf - . || [ $? -eq 1 ]; } | tar -C "$new/$settings" -xf - # 1: a file has changed
    done
    # The agents' permission files contain the run command too, once for each seed.
    shopt -s nullglob
    sed -i 's#uv run train\.py#uv run deploy/slurm/train-under-srun.sh#g' \
        "$new"/program.md "$new"/agents/claude.json "$new"/.claude/*.json "$new"/{agents/codex,.codex}/rules/*.rules
    git -C "$new" -c user.name=autoresearch -c user.email=autoresearch@localhost -c commit.gpgsign=false \
        commit --quiet -m "runs go to a compute node" -- program.md agents
    git -C "$new" switch --quiet -c "autoresearch/$tag-login"
    mv "$new" "$work/tree"
fi
cd "$work/tree"

# One allocation for the night: a run that waited in the queue would exceed the time limit of the agent's shell. If the
# job is lost (preempted, cancelled, its node down), another one takes its place, for the rest of the night.
options=(--partition "$PARTITION" --ntasks 1 --cpus-per-task "${CPUS:-8}" --mem "${MEM:-32G}")
[ -z "$ACCOUNT" ] || options+=(--account "$ACCOUNT")
[ "${GRES:-}" = none ] || options+=(--gres "${GRES:-gpu:1}")
ends=$(awk -v h="$hours" -v now="$(date +%s)" 'BEGIN { printf "%d", now + h * 3600 + 25 * 60 }')
job=$work/job-$$ # the id of the present one, for train-under-srun.sh
name=autoresearch-${tag//[^A-Za-z0-9_.-]/-}-login-$(hostname -s)-$$ # of no other job: an array may have the same TAG
cancel() { scancel --user="$(id -un)" --name="$name" || true; }     # the job whose id is not known yet, too
allocate() {
    local minutes=$(((ends - $(date +%s)) / 60))
    [ "$minutes" -gt 0 ] &&
        salloc --no-shell --job-name "$name" --time "$minutes" "${options[@]}" 2>&1 < /dev/null |
        tee /dev/stderr | sed -n 's/.*Granted job allocation \([0-9]*\).*/\1/p' > "$job.new" &&
        mv "$job.new" "$job"
}
replace=
trap '[ -z "$replace" ] || kill -- -"$replace" 2> /dev/null || true; cancel; rm -f "$job" "$job.new"' EXIT
allocate
set -m # a process group of its own, so that a salloc which is still waiting ends with the night
# It ends by itself if this script was killed and could not end it. A squeue that fails tells nothing of the job.
while sleep 60 && kill -0 $$ 2> /dev/null && [ "$(date +%s)" -lt "$ends" ]; do
    if jobs=$(squeue --noheader --user="$(id -un)" --format=%i) && ! grep -qx "$(cat "$job")" <<< "$jobs"; then
        echo "job $(cat "$job") is lost: asking for another one" >&2
        allocate || true
        kill -0 $$ 2> /dev/null || cancel
    fi
done &
replace=$!
set +m

export SRUN_JOB_FILE=$job SRUN_OPTIONS=--overlap
export UV_PROJECT_ENVIRONMENT=$source/.venv UV_OFFLINE=1 UV_NO_SYNC=1
uv run -m lab night --hours "$hours" --agent "$agent"
