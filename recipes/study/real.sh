#!/usr/bin/env bash
# Run one setting of the study on a real model (docs/study/plan.md): train every arm with every seed, then evaluate it, and the
# model as it was before. The same command resumes runs and evaluations that were interrupted and skips those that have finished.
#   bash recipes/study/real.sh alpaca
#   bash recipes/study/real.sh questions
#   ARMS="plain concat" SEEDS=11 TASKS=qa_5 bash recipes/study/real.sh alpaca       # two parts, the main measure
# JOBS parts run at the same time, each on one core with 8 GB of memory. PYTHON is the interpreter.
set -euo pipefail
SETTING=${1:?name a setting: alpaca or questions}
PYTHON=${PYTHON:-python}
case $SETTING in
    alpaca) SEEDS=${SEEDS:-"11 12 13"} ARMS=${ARMS:-"plain concat copies plain_79 separate concat_all plain_48"} ;;
    questions) SEEDS=${SEEDS:-"21 22 23"} ARMS=${ARMS:-"plain concat copies plain_159"} ;;
    *) echo "error: no setting $SETTING; name alpaca or questions" >&2 && exit 2 ;;
esac
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
    if [ "$1" = untrained ]; then
        run=checkpoints/smollm2
    elif [ ! -e "$run/summary.json" ]; then
        fit "$1" "$2"
    fi
    for task in $TASKS; do
        meap_lit evaluate --config "recipes/study/real/eval/$task.yaml" --checkpoint "$run" --label "$1-seed_$2" \
            --output "evaluations/study_real_$SETTING" >/dev/null
    done
}

export -f meap_lit fit part

# the data, once, so that parts that start together do not all prepare it
mkdir -p data/study_real
rows() { gzip --decompress --stdout data/eval/qa_data/nq-open-oracle.jsonl.gz | sed -n "$1"; }
rows '1801,$p' >data/study_real/questions_test.jsonl
rows '1,1800p' >data/study_real/questions_rest.jsonl
[ -e data/study_real/questions_train.jsonl ] || "$PYTHON" docs/study/questions.py data/study_real/questions_rest.jsonl \
    --num_questions 700 --num_documents 3 --output data/study_real/questions_train.jsonl
[ -e data/study_real/essays ] || meap_lit prepare text --input data/eval/haystack --tokenizer checkpoints/smollm2 \
    --val_share 0.5 --output data/study_real/essays
meap_lit preview --config "recipes/study/real/$SETTING.yaml" >/dev/null
{ for seed in $SEEDS; do for arm in $ARMS; do echo "$arm $seed"; done; done; echo "untrained 0"; } |
    xargs -r -P "$JOBS" -L 1 bash -euc 'part "$@"' _
