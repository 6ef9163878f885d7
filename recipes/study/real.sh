#!/usr/bin/env bash
# Run one setting of the study on a real model (docs/study/plan.md): train every arm with every seed, then evaluate it. The
# same command resumes runs and evaluations that were interrupted and skips those that have finished.
#   bash recipes/study/real.sh alpaca
#   ARMS="plain concat" SEEDS=11 TASKS=qa_5 bash recipes/study/real.sh alpaca       # two parts, the main measure
# JOBS parts run at the same time, each on one core with 8 GB of memory. PYTHON is the interpreter.
set -euo pipefail
SETTING=${1:?name a setting: alpaca}
PYTHON=${PYTHON:-python}
SEEDS=${SEEDS:-"11 12 13"}
ARMS=${ARMS:-"plain concat copies plain_79 separate concat_all plain_48"}
TASKS=${TASKS:-"qa_5 qa_10 qa_20 needle key_value perplexity attention"}
JOBS=${JOBS:-2}
export OMP_NUM_THREADS=1 SETTING PYTHON TASKS

meap_lit() { "$PYTHON" -m meap_lit "$@"; }

fit() { # ARM SEED
    local options=()
    case $1 in
        plain) ;;
        plain_*) options=(--budget.max_epochs null --budget.max_steps "${1#plain_}") ;;
        concat) options=(--data.duplication.mask_ratio 0.1) ;;
        concat_all) options=(--data.duplication.mask_ratio 0.1 --data.duplication.min_copied 0) ;;
        copies) options=(--data.duplication.mask_ratio 0.1 --data.duplication.mask_inputs false) ;;
        separate) options=(--data.duplication.mask_ratio 0.1 --data.duplication.layout separate) ;;
        *) echo "error: no arm $1" >&2 && exit 2 ;;
    esac
    meap_lit fit --config "recipes/study/real/$SETTING.yaml" "${options[@]}" --seed_everything "$2" \
        --trainer.logger.name "$1" --ckpt_path last --trainer.enable_progress_bar false
}

part() { # ARM SEED
    local run="runs/study_real_$SETTING/$1/seed_$2"
    [ -e "$run/summary.json" ] || fit "$1" "$2"
    for task in $TASKS; do
        meap_lit evaluate --config "recipes/study/real/eval/$task.yaml" --checkpoint "$run" --label "$1-seed_$2" \
            --output "evaluations/study_real_$SETTING" >/dev/null
    done
}

export -f meap_lit fit part

# the data, once, so that parts that start together do not all prepare it
mkdir -p data/study_real
[ -e data/study_real/questions_test.jsonl ] ||
    gzip --decompress --stdout data/eval/qa_data/nq-open-oracle.jsonl.gz | tail -n +1801 >data/study_real/questions_test.jsonl
[ -e data/study_real/essays ] || meap_lit prepare text --input data/eval/haystack --tokenizer checkpoints/smollm2 \
    --val_share 0.5 --output data/study_real/essays
meap_lit preview --config "recipes/study/real/$SETTING.yaml" >/dev/null
for seed in $SEEDS; do for arm in $ARMS; do echo "$arm $seed"; done; done |
    xargs -r -P "$JOBS" -L 1 bash -euc 'part "$@"' _
