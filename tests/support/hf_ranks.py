"""Train a tiny Llama by transformers' Trainer, for a launcher of several processes.

    torchrun --nproc-per-node 2 tests/support/hf_ranks.py OUTPUT

Each process writes what its model reads, a list of batches, to OUTPUT/KIND-RANK-WORLD_SIZE.json, for each of `KINDS`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from meap_lit.integrations.transformers import (
    MEAPCollator,
    MEAPFineTuningCollator,
    MEAPPretrainingCollator,
    add_mask_token,
    with_sample_ids,
)
from meap_lit.masking.duplication import Duplication
from tests.support.word_tokenizer import save_word_level

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16, "vocab_size": 90}


KINDS = ("pretraining", "fine-tuning")


def main(kind: str, output: Path) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    folder = save_word_level(output / f"tokenizer-{kind}-{rank}-{world}", 90, has_mask=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    add_mask_token(model, tokenizer)
    ids = torch.randint(2, 90, (16, 24), generator=torch.Generator().manual_seed(0)).tolist()
    rows = with_sample_ids(Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4 + row[4:] for row in ids]}))
    collator: MEAPCollator = MEAPPretrainingCollator(tokenizer, mask_ratio=0.3)
    if kind == "fine-tuning":
        collator = MEAPFineTuningCollator(tokenizer, Duplication(0.3, min_copied=5))
    read: list[list[list[int]]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].tolist()))
    arguments = TrainingArguments(
        str(output), use_cpu=True, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2, max_steps=4,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[collator]).train()
    (output / f"{kind}-{rank}-{world}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    for each in KINDS:
        main(each, Path(sys.argv[1]))
