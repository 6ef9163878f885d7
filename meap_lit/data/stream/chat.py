"""Rows of conversations: a row is some documents, samples with or without their masked copies, packed together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from meap_lit.data.store.remote import DEFAULT_STORAGE, Storage
from meap_lit.data.stream.packing import DocumentKey, Row
from meap_lit.data.stream.samples import ChunkedSamples, check_vocabulary
from meap_lit.masking import id_of_sample
from meap_lit.masking.duplication import Answer, Document, Duplication, concatenate, masked_copy, original
from meap_lit.model.attention import Documents
from meap_lit.model.loss import IGNORE_INDEX

POSITIONS_STEP = 256
"""Step of the number of rows of the loss, so that its large buffers have few sizes and do not fragment the memory."""


class PackedBatch(TypedDict):
    """Packed rows; tensors are [B, T] where nothing else is said.

    Attributes:
        input_ids: Token ids, int64.
        labels: Target of each position, int64; `IGNORE_INDEX` where nothing is learned.
        label_positions: Places of the supervised positions in the flattened labels, and of a few others that make S a
            multiple of `POSITIONS_STEP`, [S], int64. Only these go through the head; their number is known on the host,
            so no device is asked for it.
        position_ids: Positions within each document, int64.
        in_copy: Whether a position belongs to a masked copy, bool.
        documents: Which runs of tokens attend among themselves.
        num_labels: Supervised tokens of the whole optimizer step, over its micro-batches and all devices.
        num_masked: Those of them that are masked tokens of copies.
        num_copies: Masked copies of the whole step.
        num_tokens: Tokens of the whole step, without the empty rests of rows.
        source: In validation, the number of the dataset that the rows come from.
    """

    input_ids: Tensor
    labels: Tensor
    label_positions: Tensor
    position_ids: Tensor
    in_copy: Tensor
    documents: Documents
    num_labels: int
    num_masked: int
    num_copies: int
    num_tokens: int
    source: NotRequired[int]


class ChatSamples(ChunkedSamples):
    """Random access to the samples of one split of a dataset of conversations."""

    def __init__(
        self,
        path: str,
        vocab_size: int,
        storage: Storage = DEFAULT_STORAGE,
        files: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, storage, files)
        self.vocab_size = vocab_size

    def __getitem__(self, index: int) -> tuple[Tensor, list[Answer]]:
        """Return ids, [n] int64, and answers of a sample; raise `UserError` if an id is outside the vocabulary."""
        sample = self._load(index)
        input_ids = sample["input_ids"].long()
        check_vocabulary(input_ids, self.vocab_size, self.path)
        return input_ids, [Answer(*answer) for answer in sample["answers"].tolist()]


@dataclass(frozen=True)
class RowReader:
    """Reads packed rows: lays out their documents and draws the masks of the copies."""

    sources: Sequence[ChatSamples | Sequence[tuple[Tensor, list[Answer]]]]
    """Token ids and answers of the samples of each source, by number."""
    duplication: Duplication
    seq_len: int
    mask_token_id: int
    pad_token_id: int
    """Id that fills the rest of a row; any will do, since nothing attends to it."""
    seed: int

    def read(self, rows: Sequence[Row], step_rows: Sequence[Row], num_rows: int) -> PackedBatch:
        """Return a batch of `rows`, filled up with empty ones; see `BatchReader.read`."""
        documents = [[self.document(key) for key in row.documents] for row in rows]
        documents += [[] for _ in range(num_rows - len(rows))]
        shape = (num_rows, self.seq_len)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        in_copy = torch.zeros(shape, dtype=torch.bool)
        for number, row in enumerate(documents):
            start = 0
            for document in row:
                place = (number, slice(start, start + len(document)))
                input_ids[place] = document.input_ids
                labels[place] = document.labels
                position_ids[place] = document.position_ids
                in_copy[place] = document.in_copy
                start += len(document)
        return PackedBatch(
            input_ids=input_ids,
            labels=labels,
            label_positions=_label_positions(labels),
            position_ids=position_ids,
            in_copy=in_copy,
            documents=Documents.of_rows([[len(document) for document in row] for row in documents], self.seq_len),
            num_labels=sum(row.num_labels for row in step_rows),
            num_masked=sum(row.num_masked for row in step_rows),
            num_copies=sum(row.num_copies for row in step_rows),
            num_tokens=sum(row.num_tokens for row in step_rows),
        )

    def document(self, key: DocumentKey) -> Document:
        """Return the document that `key` names, with its masks drawn."""
        source, sample, epoch = key.visit
        input_ids, answers = self.sources[source][sample]
        if not key.has_copy:
            return original(input_ids, answers)
        copy = masked_copy(
            input_ids,
            answers,
            self.duplication,
            mask_token_id=self.mask_token_id,
            seed=self.seed,
            sample_id=id_of_sample(source, sample),
            visit=epoch,
        )
        if not key.has_original:
            return copy
        return concatenate(original(input_ids, answers), copy, self.duplication.copy_positions)


def _label_positions(labels: Tensor) -> Tensor:
    """Return the places in `labels`, [B, T], that go through the head, [S]; see `PackedBatch`."""
    is_supervised = labels.flatten() != IGNORE_INDEX
    others = (~is_supervised).nonzero()[:, 0]
    num_more = -int(is_supervised.sum()) % POSITIONS_STEP
    is_supervised[others[:num_more]] = True
    return is_supervised.nonzero()[:, 0]
