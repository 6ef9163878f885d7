"""MEAP in the trainers of Hugging Face: transformers' `Trainer` and TRL's `SFTTrainer`.

Three lines of a training script change:

    add_mask_token(model, tokenizer)
    meap = MEAPPretrainingCollator(tokenizer, mask_ratio=0.15)  # or MEAPFineTuningCollator(tokenizer)
    trainer = Trainer(model, args, train_dataset=with_sample_ids(dataset), data_collator=meap, callbacks=[meap])

The object is a collator and a callback, and must be passed as both: as a callback it learns from the trainer what its
masks depend on. A row of the dataset holds `input_ids`, a `sample_id` if it is a training row, and perhaps `labels`.
Labels are aligned with `input_ids` as Hugging Face has them: the label at position t is the target of position t - 1,
and models of transformers shift them. A row without a `sample_id` is never masked.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils.generic import is_flash_attention_requested

from meap_lit.errors import UserError, check_range
from meap_lit.hf.weights import copy_rows
from meap_lit.masking import check_ratio, id_of_sample, num_masked, sample_positions
from meap_lit.masking.duplication import Answer, Document, Duplication, concatenate, masked_copy, original
from meap_lit.masking.schedules import Constant, MaskSchedule
from meap_lit.model import IGNORE_INDEX
from meap_lit.model.config import vocab_rows
from meap_lit.tokenizer.tokenizer import MASK_TOKEN, MASK_TOKENS

SAMPLE_ID = "sample_id"
"""Column of the training rows, int64: what tells the rows of a dataset apart."""

Sample = Mapping[str, Any]
"""A row of a dataset."""

_HOOKS: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()
"""The hook of a collator on each model in training."""


def add_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give tokenizer and model a mask token, as a run of this project does, and return its id.

    A mask token that the tokenizer has is kept: its `mask_token`, or a token named [MASK] or <mask>. Otherwise [MASK]
    becomes the next free id. If the model has no row for it, embedding and head grow to a multiple of 64 rows, and new
    rows are the mean of the old ones. A new mask token that falls on a spare row of the model starts as the mean of
    the rows before it.

    Call it before adapters are added and before an optimizer is made, and save the tokenizer with the model. A second
    call changes nothing.

    Raises:
        UserError: If the tokenizer does not belong to the model, or its vocabulary has holes, so that transformers
            gives [MASK] an id that is taken.
    """
    vocabulary = tokenizer.get_vocab()
    known = next((token for token in (tokenizer.mask_token, *MASK_TOKENS) if token in vocabulary), None)
    expected = vocabulary[known] if known else max(vocabulary.values()) + 1
    tokenizer.add_special_tokens({"mask_token": known or MASK_TOKEN})
    mask_token_id = tokenizer.mask_token_id
    if mask_token_id != expected:
        raise UserError(
            f"the vocabulary of tokenizer {tokenizer.name_or_path} has holes, and transformers gives {MASK_TOKEN} the "
            f"id {mask_token_id} instead of {expected}; write a tokenizer that has the token with "
            f"meap_lit.tokenizer.tokenizer.Tokenizer.load(FOLDER).save(NEW_FOLDER), and load that"
        )
    before = [weight.detach().clone() for weight in _vocabulary_weights(model)]
    num_tokens, num_rows = max(tokenizer.get_vocab().values()) + 1, len(before[0])
    rows = vocab_rows(num_tokens, num_rows, new_tokens=1)
    if rows is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has {num_tokens} ids and the model {num_rows} vocabulary rows; "
            f"use the tokenizer that belongs to the model"
        )
    if known and rows == num_rows:
        return mask_token_id
    if rows > num_rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight, old in zip(_vocabulary_weights(model), before, strict=True):
            copy_rows(weight, old, None if known else mask_token_id)
    return mask_token_id


def _vocabulary_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return the weights of embedding and head, [V, D] each; one if they are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    return [embedding.weight] if head.weight is embedding.weight else [embedding.weight, head.weight]


def with_sample_ids(dataset: Any, source: int = 0) -> Any:
    """Return a dataset of the library `datasets` with the column `sample_id`: the number of each row.

    Number several datasets that are mixed in one run by `source`, so that no two rows have the same id. Call it on the
    training set, before it is shuffled, and once the rows are final: packing of TRL drops the column.

    Args:
        dataset: A `Dataset` or an `IterableDataset`.
        source: Number of the dataset.

    Raises:
        UserError: If the dataset is streamed and has several shards.
    """
    if hasattr(dataset, "__len__"):
        return dataset.add_column(SAMPLE_ID, [id_of_sample(source, index) for index in range(len(dataset))])
    if dataset.num_shards > 1:  # `datasets` counts the rows of each dataloader worker anew
        raise UserError(
            f"the streamed dataset has {dataset.num_shards} shards, so the numbers of its rows would depend on the "
            f"dataloader workers; store a column {SAMPLE_ID} with the number of each row in the dataset itself"
        )
    return dataset.map(lambda row, index: {SAMPLE_ID: id_of_sample(source, index)}, with_indices=True)


class MEAPCollator(TrainerCallback, ABC):
    """What the two collators share: padding, and what a trainer tells them as a callback.

    A batch has `input_ids`, `labels` and `attention_mask`, padded on the right, each [B, T] int64; `labels` are
    `IGNORE_INDEX` at padding. A batch of training rows also has `sample_ids`, [B] int64, which a hook on the model
    takes out before its forward pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token; call add_mask_token(model, tokenizer) first")
        self.mask_token_id: int = tokenizer.mask_token_id
        # any id will do, since nothing attends to padding and it has no labels
        self.pad_token_id: int = next(
            id for id in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if id is not None
        )
        self.seed = seed
        self.is_callback = False
        self._is_training = torch.zeros((), dtype=torch.int64).share_memory_()
        """1 between the beginning and the end of training, in memory that dataloader workers share."""

    @abstractmethod
    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the batch of some rows of the dataset."""

    def _sample_ids(self, rows: Sequence[Sample]) -> list[int]:
        """Return the ids of rows, in training; none of evaluation rows, or outside of it."""
        if not self.is_callback:  # the trainer has removed the ids then, unless it was told not to
            raise UserError(
                f"pass the {type(self).__name__} to the trainer twice: data_collator=meap, callbacks=[meap]"
            )
        return [int(row[SAMPLE_ID]) for row in rows] if SAMPLE_ID in rows[0] and self._is_training else []

    def on_init_end(self, args: Any, *others: Any, **kwargs: Any) -> None:
        self.is_callback = True
        args.remove_unused_columns = False  # the trainer would remove the sample ids, which no model takes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        rows = model.get_input_embeddings().num_embeddings
        if self.mask_token_id >= rows:
            raise UserError(
                f"the model has {rows} vocabulary rows, none for the mask token {self.mask_token_id}; "
                f"call add_mask_token(model, tokenizer) before the trainer is made"
            )
        self.on_train_end(args, state, control, model=model)  # of an interrupted run, with whatever collator
        self._is_training.fill_(1)
        _HOOKS[model] = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_training.fill_(0)
        model = kwargs.get("model")
        if model is not None and model in _HOOKS:
            _HOOKS.pop(model).remove()

    def _before_forward(self, model: nn.Module, args: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take the sample ids out of a batch that the model is called with."""
        sample_ids = batch.pop("sample_ids", None)
        if model.training and sample_ids is None:
            raise UserError(
                f"the training set has no column {SAMPLE_ID}; pass train_dataset=with_sample_ids(dataset). Packing of "
                f"TRL drops the column: pack the rows before, and set packing=False"
            )
        return args, self.prepare_inputs(batch, sample_ids, model.training)

    @abstractmethod
    def prepare_inputs(self, batch: dict[str, Any], sample_ids: Tensor | None, training: bool) -> dict[str, Any]:
        """Return what the model is to be called with, given a batch on its device."""


class MEAPPretrainingCollator(MEAPCollator):
    """Masks for pretraining: a share P of the input tokens, by (seed, optimizer step, sample id, position).

    The masks equal those of `MEAPPretraining` with the same seed, bit for bit, for rows of seq_len + 1 tokens whose ids
    are the indices of the blocks. As there, the last token of a row is a target only, so a row of n tokens has n - 1
    inputs, and `num_masked(P, n - 1)` of them are masked. Attention spans the whole row, and padding is never masked.

    A collator cannot know the optimizer step of a batch: dataloader workers read ahead, accelerate reads one batch
    ahead, and the trainer reads all micro-batches of a step before the first forward pass. So a batch leaves the
    collator without masks, and a hook on the model draws them just before the forward pass, on the device, at the
    step that the trainer is at. Masks do not depend on workers, batch size, accumulation or devices, and a resume
    continues with them. In evaluation the hook masks nothing.

    Args:
        tokenizer: Tokenizer with a mask token, see `add_mask_token`.
        mask_ratio: P: a number, or a schedule of the optimizer step. With 0 the model gets the batch unchanged.
        seed: Seed of the masks.
        protected_ids: Token ids that are never masked.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_ratio: float | MaskSchedule = 0.15,
        seed: int = 0,
        protected_ids: Sequence[int] = (),
    ) -> None:
        super().__init__(tokenizer, seed)
        if not isinstance(mask_ratio, MaskSchedule):
            check_ratio("mask_ratio", mask_ratio)
        self.mask_ratio = mask_ratio if isinstance(mask_ratio, MaskSchedule) else Constant(mask_ratio)
        self.protected_ids = list(protected_ids)
        self.step = self.max_steps = 0

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        input_ids = [_input_ids(row) for row in rows]
        labels = [_tensor(row.get("labels", row["input_ids"])) for row in rows]
        batch = _padded(input_ids, labels, self.pad_token_id)
        ids = self._sample_ids(rows)
        return {**batch, "sample_ids": torch.tensor(ids)} if ids else batch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step, self.max_steps = state.global_step, state.max_steps

    def prepare_inputs(self, batch: dict[str, Any], sample_ids: Tensor | None, training: bool) -> dict[str, Any]:
        if sample_ids is None or not training:
            return batch
        return {**batch, "input_ids": self._masked(batch["input_ids"], batch["attention_mask"], sample_ids)}

    def _masked(self, input_ids: Tensor, attention_mask: Tensor, sample_ids: Tensor) -> Tensor:
        """Return the inputs of the current step, [B, T], given padded token ids, [B, T]."""
        mask_ratio = self.mask_ratio(self.step, self.max_steps)
        if mask_ratio == 0:
            return input_ids
        seq_len, device = input_ids.size(1), input_ids.device
        num_inputs = attention_mask.sum(dim=1) - 1  # [B]
        # a table, since reading the lengths would wait for the device
        counts = _counts(mask_ratio, seq_len).to(device)[num_inputs]
        eligible = torch.arange(seq_len, device=device) < num_inputs[:, None]  # [B, T]
        if self.protected_ids:
            eligible &= ~torch.isin(input_ids, torch.tensor(self.protected_ids).to(device))
        input_mask = sample_positions(eligible, counts, sample_ids, seed=self.seed, step=self.step)
        return input_ids.masked_fill(input_mask, self.mask_token_id)


@lru_cache(maxsize=8)
def _counts(mask_ratio: float, seq_len: int) -> Tensor:
    """Return the number of masks for each number of inputs below `seq_len`, [T]."""
    return torch.tensor([num_masked(mask_ratio, length) for length in range(seq_len)])


class MEAPFineTuningCollator(MEAPCollator):
    """Duplicated sequences for fine-tuning: a share of every long answer masked, by (seed, sample id, epoch).

    Copies and labels are those of `FineTuningData` with the same seed, bit for bit, if a row has the index of the
    conversation as its id, and so is the loss of a step over the same conversations. A row of the batch is one
    document; nothing is packed. In the layout `separate` a copy is a row of its own, so a batch may have up to twice
    as many rows as the trainer asked for.

    The epoch is in memory that dataloader workers share. The trainer announces an epoch before its first batch is
    read, so masks do not depend on workers, batch size, accumulation or devices, and a resume continues with them.
    Rows that a sampler repeats to fill the last batch of an epoch have the same masks twice.

    A row with a `sample_id` gets a copy in training; an evaluation set must have no such column.

    What is learned of a row follows from `answers` ([A, 3] int: start, stop, end; see `duplication.Answer`), or from
    `labels`: every run of labels is an answer, and special tokens at its end close it, so they are learned but never
    masked. SFTTrainer makes such labels (`completion_only_loss`, `assistant_only_loss`).

    Args:
        tokenizer: Tokenizer with a mask token, see `add_mask_token`.
        duplication: How samples are duplicated and masked. If not given, samples without room for a copy are trained
            without one, unlike in a recipe; with `no_room="stop"` the run ends at the first of them.
        seed: Seed of the masks.
        max_length: Tokens of the longest row, copy included; the context of the model (`max_position_embeddings`, or a
            smaller `sliding_window`) if not given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        duplication: Duplication | None = None,
        seed: int = 0,
        max_length: int | None = None,
    ) -> None:
        super().__init__(tokenizer, seed)
        check_range("max_length", max_length, "[2, inf)")
        self.duplication = duplication or Duplication(no_room="skip_copy")
        self.max_length = max_length
        added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id}
        # a text may have unknown tokens, but some tokenizers name their end of text as the unknown token too
        self.special_ids = {*added, *tokenizer.all_special_ids} - ({tokenizer.unk_token_id} - others)
        self._tokenizer = tokenizer
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._epoch.fill_(int(state.epoch or 0) - 1)
        config = kwargs["model"].config.get_text_config()
        if self.max_length is None:
            limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
            self.max_length = min(filter(None, limits), default=None)
        if self._restarts and is_flash_attention_requested(config):
            raise UserError(
                "copy_positions restarted cannot be combined with FlashAttention, for which a position of 0 begins "
                "another document; use continued, or load the model with attn_implementation='sdpa'"
            )

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._epoch += 1

    @property
    def _restarts(self) -> bool:
        return self.duplication.layout == "concat" and self.duplication.copy_positions == "restarted"

    def __call__(self, rows: Sequence[Sample]) -> dict[str, Tensor]:
        ids = self._sample_ids(rows)
        documents: list[Document] = []
        sample_ids: list[int | None] = []
        for row, sample_id in zip(rows, ids or repeat(None)):
            of_row = list(self._documents(row, sample_id))
            documents += of_row
            sample_ids += [sample_id] * len(of_row)
        # a document has the target of a position, Hugging Face has it at the next one; the last position has no target
        labels = [document.labels.roll(1) for document in documents]
        batch = _padded([document.input_ids for document in documents], labels, self.pad_token_id)
        if self._restarts:
            batch["position_ids"] = pad_sequence([document.position_ids for document in documents], batch_first=True)
        return {**batch, "sample_ids": torch.tensor(sample_ids)} if ids else batch

    def _documents(self, row: Sample, sample_id: int | None) -> Iterator[Document]:
        """Yield the documents of a row: the original, the original with its copy, or both one by one."""
        input_ids, answers = _input_ids(row), self._answers(row)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise UserError(
                f"a sample has {len(input_ids)} tokens, more than max_length {self.max_length}; raise it, or truncate "
                f"the samples (SFTConfig has max_length)"
            )
        first = original(input_ids, answers)
        if sample_id is None or not self._is_copied(input_ids, answers):
            yield first
            return
        copy = masked_copy(
            input_ids,
            answers,
            self.duplication,
            mask_token_id=self.mask_token_id,
            seed=self.seed,
            sample_id=sample_id,
            visit=int(self._epoch),
        )
        if self.duplication.layout == "concat":
            yield concatenate(first, copy, self.duplication.copy_positions)
        else:
            yield first
            yield copy

    def _is_copied(self, input_ids: Tensor, answers: Sequence[Answer]) -> bool:
        lengths = torch.tensor([answer.stop - answer.start for answer in answers], dtype=torch.int64)
        if not self.duplication.num_masked(lengths.numpy()).any():
            return False
        has_room = self.max_length is None or 2 * len(input_ids) <= self.max_length
        if self.duplication.layout == "concat" and not has_room and self.duplication.no_room == "stop":
            raise UserError(
                f"a sample of {len(input_ids)} tokens does not fit twice into max_length {self.max_length}; raise it, "
                f"or set no_room to skip_copy or layout to separate"
            )
        return has_room or self.duplication.layout == "separate"

    def _answers(self, row: Sample) -> list[Answer]:
        """Return the answers of a row, from its column `answers` or from its labels."""
        if "answers" in row:
            return [Answer(*map(int, answer)) for answer in row["answers"]]
        if "labels" not in row:
            raise UserError(
                "the rows have neither labels nor answers, so nothing tells answers from prompts; set labels to -100 "
                "where nothing is learned (SFTTrainer does so with prompts and completions, or assistant_only_loss)"
            )
        input_ids, labels = _tensor(row["input_ids"]), _tensor(row["labels"])
        is_learned = labels != IGNORE_INDEX
        if not torch.equal(labels[is_learned], input_ids[is_learned]):
            raise UserError(f"labels must be input_ids, or {IGNORE_INDEX} where nothing is learned; got other ids")
        is_learned[0] = False  # nothing predicts the first token
        outside = torch.zeros(1, dtype=torch.int32)
        edges = torch.diff(is_learned.int(), prepend=outside, append=outside)  # 1 where an answer starts, -1 behind it
        starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        return [self._answer(input_ids.tolist(), start, end) for start, end in zip(starts, ends, strict=True)]

    def _answer(self, input_ids: Sequence[int], start: int, end: int) -> Answer:
        """Return an answer without the special tokens that close it, and blank tokens after them."""
        stop = end
        while stop > start and input_ids[stop - 1] not in self.special_ids and self._is_blank(input_ids[stop - 1]):
            stop -= 1
        if stop == start or input_ids[stop - 1] not in self.special_ids:
            stop = end  # blank tokens of the answer itself
        while stop > start and input_ids[stop - 1] in self.special_ids:
            stop -= 1
        return Answer(start, stop, end)

    def _is_blank(self, token_id: int) -> bool:
        return not str(self._tokenizer.decode([token_id])).strip()

    def prepare_inputs(self, batch: dict[str, Any], sample_ids: Tensor | None, training: bool) -> dict[str, Any]:
        if sample_ids is not None and not training:
            raise UserError(
                f"the evaluation set has a column {SAMPLE_ID}, so its samples would have copies; take it out with "
                f"remove_columns('{SAMPLE_ID}'), or call with_sample_ids on the training set only"
            )
        return batch


def _input_ids(row: Sample) -> Tensor:
    """Return the token ids of a row, which must not be padded: padding would be masked, and learned."""
    if 0 in row.get("attention_mask", ()):
        raise UserError(
            "the rows are padded (attention_mask has a 0); tokenize without padding, the collator pads them"
        )
    return _tensor(row["input_ids"])


def _tensor(ids: Any) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.int64)


def _padded(input_ids: Sequence[Tensor], labels: Sequence[Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Return rows as a batch, padded on the right."""
    return {
        "input_ids": pad_sequence(list(input_ids), batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(list(labels), batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in input_ids], batch_first=True),
    }
