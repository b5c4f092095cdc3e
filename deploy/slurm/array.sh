#!/usr/bin/env bash
# Step 2, if compute nodes reach the agent's model (directly or by a proxy): an array of nights, one per program.
#
#   deploy/slurm/array.sh TAG HOURS 'AGENT COMMAND' PROGRAM... [-- further options of `lab slurm`]
#   deploy/slurm/array.sh nov21 8 'HOME=$REAL_HOME claude -p "Read program.md and follow it." ...' programs/*.md
#
# Without --submit among the further options it only writes the script, so that you can read it first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=deploy/slurm/site.sh
. deploy/slurm/site.sh

tag=${1:?TAG} hours=${2:?HOURS} agent=${3:?AGENT COMMAND}
shift 3
programs=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do programs+=("$1") && shift; done
[ $# -eq 0 ] || shift
options=(--partition "$PARTITION")
[ -z "$ACCOUNT" ] || options+=(--account "$ACCOUNT")

UV_OFFLINE=1 uv run --no-sync -m lab slurm --tag "$tag" --hours "$hours" --agent "$agent" \
    --programs "${programs[@]:-program.md}" "${options[@]}" "$@"
