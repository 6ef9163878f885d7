#!/usr/bin/env bash
# Nodes of eight GPUs: one task a GPU, which Lightning recognises by SLURM's own variables. All words go to `fit`.
#   sbatch --nodes 8 docs/slurm.sh --config recipes/pretrain/meap_8b.yaml --config recipes/strategy/hsdp.yaml
#SBATCH --job-name=meap
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
: "${1:?name a recipe: --config RECIPE --config OVERLAY}"
export OMP_NUM_THREADS=1
# a task that ends with an error ends the others, which would wait for it
srun --kill-on-bad-exit=1 python -m meap_lit fit "$@" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
