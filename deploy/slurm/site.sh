# Paths and partition of this cluster, sourced by the scripts in this folder. Adapt it to yours.
# shellcheck shell=bash
export SCRATCH=${SCRATCH:?a folder that login and compute nodes share}
export AUTORESEARCH_DATASET=${AUTORESEARCH_DATASET:-climbmix}
export AUTORESEARCH_CACHE=$SCRATCH/autoresearch-data
export HF_HOME=$AUTORESEARCH_CACHE/huggingface
# uv's packages and its Python are outside $HOME, which compute nodes may not see
export UV_CACHE_DIR=$SCRATCH/autoresearch-uv/cache UV_PYTHON_INSTALL_DIR=$SCRATCH/autoresearch-uv/python
PARTITION=${PARTITION:-gpu}
ACCOUNT=${ACCOUNT:-}
