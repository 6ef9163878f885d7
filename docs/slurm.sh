#!/usr/bin/env bash
# Nodes of eight GPUs: one task a GPU, which Lightning recognises by SLURM's own variables. All words go to `fit`.
#   sbatch --nodes 8 docs/slurm.sh --config recipes/pretrain/meap_8b.yaml --config recipes/strategy/hsdp.yaml
# With REQUEUE=1 before sbatch, a job that runs out of time goes back into the queue and on where it was.
#SBATCH --job-name=meap
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@300
set -euo pipefail
: "${1:?name a recipe: --config RECIPE --config OVERLAY}"
export OMP_NUM_THREADS=1
if [ -n "${REQUEUE:-}" ]; then # a folder of the job's own, so that it goes on with its own checkpoint
    set -- "$@" --trainer.logger.version "job_$SLURM_JOB_ID" --ckpt_path last
fi
status=0
# a task that ends with an error ends the others, which would wait for it
srun --kill-on-bad-exit=1 python -m meap_lit fit "$@" || status=$?
if [ -n "${REQUEUE:-}" ] && [ "$status" -eq 138 ]; then # it was told that its time is up, and has saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
