#!/bin/sh
# Runs a command in the working tree of the pod of pod.yaml, for an agent that works outside the cluster:
#
#   deploy/kubernetes/in-pod.sh uv run -m lab status
#   deploy/kubernetes/in-pod.sh sh -c 'uv run train.py > run.log 2>&1'
#   deploy/kubernetes/in-pod.sh tee train.py < train.py > /dev/null         an edit made outside
exec kubectl exec -i -n "${NAMESPACE:-autoresearch}" "${POD:-autoresearch}" -- env -C /work/autoresearch "$@"
