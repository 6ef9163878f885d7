"""The first rows of an optimizer step as the model gets them, token by token, with the counts of each row.

Rows, masks and labels come from the datamodule and the module of a recipe, through the calls that a run makes. Nothing
here masks, packs or tokenizes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.finetuning import FineTuningData
from meap_lit.data.stream.chat import RowReader
from meap_lit.data.stream.micro_batches import Slice, TrainStream
from meap_lit.data.stream.order import MixedOrder
from meap_lit.data.stream.packing import DocumentKey, PackedOrder
from meap_lit.data.stream.text import TextBatch
from meap_lit.model import IGNORE_INDEX
from meap_lit.modules import MEAPPretraining
from meap_lit.modules.base import DecoderModule
from meap_lit.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One position of a row.

    Args:
        input_id: Id that the model reads.
        input: Its text.
        original: Text of the token that the mask token replaces; None if the input is not masked.
        label_id: Id that the model predicts here, or `IGNORE_INDEX`.
        label: Its text; None if nothing is learned here.
        position: Position id.
        is_special: Whether the input is a special token.
    """

    input_id: int
    input: str
    original: str | None
    label_id: int
    label: str | None
    position: int
    is_special: bool


@dataclass(frozen=True)
class Document:
    """A document of a row.

    Args:
        name: What it is, or where it comes from.
        tokens: Its tokens; those of the original if it has a copy.
        copy: The masked copy beside them in fine-tuning, with as many tokens; empty if there is none.
    """

    name: str
    tokens: list[Token]
    copy: list[Token] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A row of training.

    Args:
        number: Its number in the run, counted from 0.
        name: Where it comes from.
        step: Optimizer step that trains on it, counted from 0.
        documents: Its documents, from left to right.
        num_padding: Tokens after the last document, which nothing attends to and nothing is learned from.
        mask_ratio: Share P that the recipe asks for at this step.
        num_maskable: Tokens that P is a share of: all of the row in pretraining, those of the copied answers in
            fine-tuning.
    """

    number: int
    name: str
    step: int
    documents: list[Document]
    num_padding: int
    mask_ratio: float
    num_maskable: int

    @property
    def tokens(self) -> list[Token]:
        """All tokens but the padding."""
        return [token for document in self.documents for token in (*document.tokens, *document.copy)]

    @property
    def num_masked(self) -> int:
        return sum(token.original is not None for token in self.tokens)

    @property
    def num_supervised(self) -> int:
        return sum(token.label is not None for token in self.tokens)


def rows_of_step(module: DecoderModule, data: StreamingData, *, step: int, max_steps: int, num_rows: int) -> list[Row]:
    """Return the first rows that a run trains on at an optimizer step; those of the next steps follow them.

    Args:
        module: The module of a recipe, after `prepare_masks` in pretraining; it needs no decoder.
        data: Its datamodule, after `setup`.
        step: Optimizer step, counted from 0.
        max_steps: Optimizer steps of the run.
        num_rows: Rows to return.

    Raises:
        UserError: If the micro-batches do not divide the global batch, or a dataset cannot be read.
    """
    data.accumulation(num_replicas=1)
    stream = data.train_stream(Slice(), start=step * data.global_batch_size)
    if isinstance(data, FineTuningData):
        rows = _chat_rows(data, stream)
    else:
        assert isinstance(module, MEAPPretraining)
        rows = _text_rows(module, data, stream, max_steps)
    return list(islice(rows, num_rows))


def why_unmasked(module: DecoderModule, data: StreamingData, step: int, max_steps: int) -> str:
    """Say why rows of a step have no masks, and how to see some."""
    if isinstance(data, FineTuningData):
        if data.duplication.mask_ratio == 0:
            return "no masks: data.duplication.mask_ratio is 0, which is plain fine-tuning"
        return (
            f"no masks: none of these conversations has a copy. An answer needs more than "
            f"{data.duplication.min_copied} tokens for it (data.duplication.min_copied), and the conversation must fit "
            f"twice into data.seq_len; show more rows with --rows"
        )
    assert isinstance(module, MEAPPretraining)
    ratios = [module.mask_ratio(number, max_steps) for number in range(max_steps)]
    highest = max(ratios)
    if highest == 0:
        return "no masks: model.mask_ratio is 0, which is plain next-token prediction"
    if ratios[step] == 0:
        first = ratios.index(highest)
        return (
            f"no masks: model.mask_ratio is 0 at step {step:,}. Its maximum is {highest:g}; see it with --step {first}"
        )
    return "no masks: all tokens of these rows are protected (model.protect, model.protect_rare)"


def _text_rows(module: MEAPPretraining, data: StreamingData, stream: TrainStream, max_steps: int) -> Iterator[Row]:
    paths, tokenizer = list(data.datasets), data.tokenizer
    assert isinstance(stream.order, MixedOrder)
    visits = stream.order.iterate(stream.start)
    for first, batch in zip(count(stream.start, data.micro_batch_size), stream):
        step = first // data.global_batch_size
        on_device = cast(TextBatch, {name: value.to(module.device) for name, value in batch.items()})
        input_ids, input_mask = (value.cpu() for value in module.mask_batch(on_device, step, max_steps))
        for row, clean in enumerate(batch["input_ids"]):
            visit = next(visits)
            positions = torch.arange(len(clean))  # what the decoder takes if it is given none
            tokens = _tokens(tokenizer, input_ids[row], clean, input_mask[row], batch["labels"][row], positions)
            ends = [end + 1 for end in (clean == tokenizer.eos_token_id).nonzero().flatten().tolist()]
            borders = sorted({0, *ends, len(clean)})
            documents = [
                Document(f"document {place}", tokens[start:stop])
                for place, (start, stop) in enumerate(pairwise(borders), start=1)
            ]
            yield Row(
                number=first + row,
                name=f"block {visit.sample:,} of {paths[visit.source]}",
                step=step,
                documents=documents,
                num_padding=0,
                mask_ratio=module.mask_ratio(step, max_steps),
                num_maskable=len(clean),
            )


def _chat_rows(data: FineTuningData, stream: TrainStream) -> Iterator[Row]:
    paths, tokenizer, reader = list(data.datasets), data.tokenizer, stream.reader
    assert isinstance(stream.order, PackedOrder)
    assert isinstance(reader, RowReader)
    numbers, packed = count(stream.start), stream.order.iterate(stream.start)
    for batch in stream:
        lengths = iter(batch["documents"].lengths)
        for input_ids, labels, position_ids, in_copy in zip(
            *(batch[name] for name in ("input_ids", "labels", "position_ids", "in_copy"))
        ):
            row, number = next(packed), next(numbers)
            input_mask = in_copy & (input_ids == tokenizer.mask_token_id)
            clean = input_ids.where(~input_mask, labels.roll(1))  # the label of a token is at the position before it
            tokens = _tokens(tokenizer, input_ids, clean, input_mask, labels, position_ids)
            documents, start = [], 0
            for key in row.documents:
                stop = start + next(lengths)
                parts = [
                    [token for token, is_copy in zip(tokens[start:stop], in_copy[start:stop]) if is_copy == wanted]
                    for wanted in (False, True)
                ]
                visit = key.visit
                name = f"conversation {visit.sample:,} of {paths[visit.source]}, epoch {visit.epoch}"
                documents.append(Document(name, *parts))
                start = stop
            num_padding = len(input_ids) - start
            if num_padding:
                next(lengths)
            yield Row(
                number=number,
                name="packed conversations",
                step=number // data.global_batch_size,
                documents=documents,
                num_padding=num_padding,
                mask_ratio=data.duplication.mask_ratio,
                num_maskable=sum(_num_maskable(reader, key) for key in row.documents if key.has_copy),
            )


def _num_maskable(reader: RowReader, key: DocumentKey) -> int:
    """Return the tokens of the answers that are masked in a copy, without those that close them."""
    _, answers = reader.sources[key.visit.source][key.visit.sample]
    lengths = np.array([answer.stop - answer.start for answer in answers])
    return int(lengths[reader.duplication.num_masked(lengths) > 0].sum())


def _tokens(
    tokenizer: Tokenizer,
    input_ids: Tensor,
    clean: Tensor,
    input_mask: Tensor,
    labels: Tensor,
    position_ids: Tensor,
) -> list[Token]:
    """Return the tokens of a row; all tensors are [T]. `clean` are the inputs without masks."""
    columns: Sequence[Tensor] = (input_ids, clean, input_mask, labels, position_ids)
    return [
        Token(
            input_id=input_id,
            input=tokenizer.text_of(input_id),
            original=tokenizer.text_of(clean_id) if is_masked else None,
            label_id=label_id,
            label=None if label_id == IGNORE_INDEX else tokenizer.text_of(label_id),
            position=position,
            is_special=input_id in tokenizer.control_ids,
        )
        for input_id, clean_id, is_masked, label_id, position in zip(*(column.tolist() for column in columns))
    ]
