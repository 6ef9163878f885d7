#!/usr/bin/env bash
# Four nodes of eight GPUs: one task a GPU, which Lightning recognises by SLURM's own variables.
#   sbatch docs/slurm.sh recipes/pretrain/meap_1.1b.yaml
#SBATCH --job-name=meap
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=TERM@300
set -euo pipefail
recipe=${1:?name a recipe}
export OMP_NUM_THREADS=1
srun python -m meap_lit fit --config "$recipe" --config recipes/strategy/hsdp.yaml \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" "${@:2}"
