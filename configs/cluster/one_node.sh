#!/bin/bash
# All GPUs of this machine, without a scheduler:
#   configs/cluster/one_node.sh configs/batchtopk.yaml output=runs/batchtopk
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi -L | wc -l)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# SIGTERM to this process reaches all ranks; each run goes on from its newest checkpoint.
exec torchrun --standalone --nproc-per-node="$GPUS" --max-restarts="${RESTARTS:-3}" \
    -m sae.cli train "$@"
