#!/usr/bin/env bash
# Step 1, on the login node, once: everything that needs a network (FlashAttention-3 only if this node has a Hopper GPU). Run it in a clone that compute nodes see.
#
#   deploy/slurm/stage.sh [options of prepare.py, such as --num-shards 20]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=deploy/slurm/site.sh
. deploy/slurm/site.sh

mkdir -p "$AUTORESEARCH_CACHE"
uv sync --frozen --no-dev --compile-bytecode # bytecode too, so that nothing is written to the packages at night
uv run --no-sync prepare.py "$@"

# Again without a network: whatever fails here would fail at night.
UV_OFFLINE=1 HF_HUB_OFFLINE=1 uv run --no-sync prepare.py "$@"
echo "staged: deploy/slurm/array.sh submits a night, or deploy/slurm/login-night.sh begins one here"
