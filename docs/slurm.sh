#!/usr/bin/env bash
# Nodes of eight GPUs, one task for each GPU. Lightning recognizes them by SLURM's own variables. All words go to `fit`.
#   sbatch --nodes 8 docs/slurm.sh --config recipes/pretrain/meap_8b.yaml --config recipes/strategy/hsdp.yaml
# With REQUEUE=1 before sbatch, a job that runs out of time returns to the queue and resumes where it stopped.
#SBATCH --job-name=meap
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
set -euo pipefail
: "${1:?name a recipe: --config RECIPE --config OVERLAY}"
export OMP_NUM_THREADS=1
if [ -n "${REQUEUE:-}" ]; then # the job has a folder of its own, so it resumes from its own checkpoint
    set -- "$@" --trainer.logger.version "job_$SLURM_JOB_ID" --ckpt_path last
fi
status=0
# a task that ends with an error ends the others, which would wait for it
srun --kill-on-bad-exit=1 python -m meap_lit fit "$@" || status=$?
if [ -n "${REQUEUE:-}" ] && [ "$status" -eq 138 ]; then # the run has saved because its time is up
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
