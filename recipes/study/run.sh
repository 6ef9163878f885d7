#!/usr/bin/env bash
# Run the study of one size: train every arm with every seed, evaluate, fine-tune, and write the report. The same command
# resumes runs that were interrupted and skips those that have finished.
#   bash recipes/study/run.sh cpu                                      # half an hour on two cores
#   ARMS="batch_masks spans protect_rare decay" TUNED= bash recipes/study/run.sh cpu
#   ARMS=mask_0.15 SEEDS=1 TUNED= bash recipes/study/run.sh gpu        # one arm and seed, no fine-tuning
#   bash recipes/study/run.sh facts                                    # an hour and a half on two cores
#   bash recipes/study/run.sh facts_256                                # five hours on two cores
# An arm is ntp, mask_P for a mask ratio P, or a recipe in recipes/study/variant. OPTIONS go to every pretraining run, and
# SUFFIX is added to its name. JOBS runs are trained at the same time, each on one core. PYTHON is the interpreter.
set -euo pipefail
SIZE=${1:?name a size: cpu, gpu, facts or facts_256}
PYTHON=${PYTHON:-python}
case $SIZE in
    facts) SEEDS=${SEEDS:-"31 32 33"} ARMS=${ARMS-"ntp late mask_0.15"} TUNED=${TUNED-} ;;
    facts_256) SEEDS=${SEEDS:-"51 52 53"} ARMS=${ARMS-"ntp late_256 mask_0.15"} TUNED=${TUNED-} ;;
esac
SEEDS=${SEEDS:-"1 2"}
ARMS=${ARMS-"ntp mask_0.05 mask_0.10 mask_0.15 mask_0.20 warmup"}
TUNED=${TUNED-"ntp mask_0.15"}
OPTIONS=${OPTIONS:-}
SUFFIX=${SUFFIX:-}
JOBS=${JOBS:-$([ "$SIZE" = gpu ] && echo 1 || echo 2)}
[ "$SIZE" = gpu ] || export OMP_NUM_THREADS=1
export SIZE PYTHON OPTIONS SUFFIX

meap_lit() { "$PYTHON" -m meap_lit "$@"; }

evaluate() { # TASK RUN LABEL
    meap_lit evaluate --config "$1" --checkpoint "$2" --label "$3" --output "evaluations/study_$SIZE" >/dev/null
}

pretrain() { # ARM SEED
    local name="$1$SUFFIX" arm=()
    local run="runs/study_$SIZE/$name/seed_$2"
    case $1 in
        ntp) ;;
        mask_*) arm=(--model.mask_ratio "${1#mask_}") ;;
        *) arm=(--config "recipes/study/variant/$1.yaml") ;;
    esac
    # shellcheck disable=SC2086 # several options
    [ -e "$run/summary.json" ] || meap_lit fit --config "recipes/study/$SIZE.yaml" "${arm[@]}" --seed_everything "$2" \
        $OPTIONS --trainer.logger.name "$name" --ckpt_path last --trainer.enable_progress_bar false
    for task in "recipes/study/eval_$SIZE"/*.yaml; do evaluate "$task" "$run" "$name-seed_$2"; done
}

tune() { # WAY ARM SEED
    local run="runs/study_${SIZE}_sft/$2-$1/seed_$3"
    [ -e "$run/summary.json" ] || meap_lit fit --config "recipes/study/sft/${SIZE}_$1.yaml" --seed_everything "$3" \
        --model.init_from "runs/study_$SIZE/$2/seed_$3" --trainer.logger.name "$2-$1" \
        --ckpt_path last --trainer.enable_progress_bar false
    evaluate "recipes/study/eval_$SIZE/facts.yaml" "$run" "$2-$1-seed_$3"
}

export -f meap_lit evaluate pretrain tune
each() { xargs -r -P "$JOBS" -L 1 bash -euc "$1"' "$@"' _; }

# prepare the data once, so that runs that start together do not all prepare it
meap_lit preview --config "recipes/study/$SIZE.yaml" >/dev/null
for seed in $SEEDS; do for arm in $ARMS; do echo "$arm $seed"; done; done | each pretrain
for seed in $SEEDS; do for arm in $TUNED; do for way in ntp concat separate; do echo "$way $arm $seed"; done; done; done |
    each tune
meap_lit report --runs "runs/study_$SIZE"* --evaluations "evaluations/study_$SIZE" \
    --claims recipes/study/claims.yaml --output report
