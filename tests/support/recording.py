"""A callback that writes down what every process really trained on."""

import hashlib
import json
from pathlib import Path

import lightning as L


class Recorder(L.Callback):
    """Appends one line for every micro-batch to `folder`/RANK.jsonl.

    A line holds the optimizer step, the micro-batch, the data-parallel rank, a hash of each row, and what stands in
    each row: the id of its sample, or the tokens of its documents.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step, micro_batch = divmod(batch_idx, trainer.accumulate_grad_batches)
        if "documents" in batch:
            contents = documents(batch, trainer.datamodule.tokenizer.eos_token_id)
        else:
            contents = batch["sample_ids"].tolist()
        line = {
            "step": step,
            "micro_batch": micro_batch,
            "replica": trainer.datamodule.rank_slice.rank,
            "hashes": hashes(batch),
            "contents": contents,
        }
        with open(self.folder / f"{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")


def hashes(batch):
    """Of each row: its tokens, labels and positions."""
    columns = [value for value in batch.values() if hasattr(value, "shape") and value.dim() == 2]
    return [
        hashlib.sha256(b"".join(column[row].contiguous().numpy().tobytes() for column in columns)).hexdigest()
        for row in range(len(batch["input_ids"]))
    ]


def documents(batch, pad_token_id):
    """The tokens of each document of each row of a packed batch, padding left out."""
    rows = [[] for _ in batch["input_ids"]]
    tokens, start, seq_len = batch["input_ids"].flatten().tolist(), 0, batch["input_ids"].size(1)
    for length in batch["documents"].lengths:
        document = tokens[start : start + length]
        if set(document) != {pad_token_id}:
            rows[start // seq_len].append(document)
        start += length
    return rows
