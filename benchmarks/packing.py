"""Compare packing with padding: tokens per second, against one document per row padded to the longest of its batch.

The same conversations, with the same masked copies, go through full training steps (forward, loss, backward, clip,
AdamW) of one model, laid out in two ways: packed into rows of `seq_len`, and one document a row in batches of
`padded_rows`, which is what a padding collator does. Only real tokens count. Each turn has other conversations, as
training has, because a kernel that prepares itself for every new length is fast on those that it has seen. Lengths are
drawn from a log-normal distribution with the long tail of instruction data; contents are random, which changes no time.

    python -m benchmarks.packing                                                     # a small model on this CPU
    python -m benchmarks.packing --model 1.1b --device cuda --precision bf16 --seq_len 4096 --rows 4 --padded_rows 16
"""

import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.page import check_device, main, page, publish
from benchmarks.step import known_decoder, seconds_of
from meap_lit.data.store.chunks import ChatIndex
from meap_lit.data.stream.chat import RowReader
from meap_lit.data.stream.order import Visit
from meap_lit.data.stream.packing import Row, Sizes, pack_rows
from meap_lit.errors import UserError
from meap_lit.masking.duplication import Answer, Document, Duplication
from meap_lit.model import IGNORE_INDEX, Decoder, DecoderConfig, Documents
from meap_lit.modules import AdamW


def benchmark(
    model: Literal["small", "0.1b", "0.3b", "0.5b", "1.1b"] = "small",
    layout: Literal["concat", "separate"] = "concat",
    conversations: int = 400,
    median_tokens: float = 110.0,
    spread: float = 0.6,
    seq_len: int = 2048,
    rows: int = 1,
    padded_rows: int = 8,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
    repetitions: int = 3,
    output: Path | None = None,
) -> None:
    """Print how fast a model trains on packed and on padded rows.

    Args:
        model: A small model, or one of the paper's ladder as recipes/pretrain has it.
        layout: Where the masked copies are.
        conversations: Samples of one pass, drawn anew for each turn; half of each is the answer.
        median_tokens: Median length of a sample.
        spread: Standard deviation of the logarithm of its length.
        seq_len: Length of a packed row.
        rows: Packed rows of a forward.
        padded_rows: Documents of a padded forward.
        precision: `bf16` is autocast with float32 weights and optimizer states, as Lightning's bf16-mixed.
        device: Where to run.
        repetitions: Passes of each kind, in turns.
        output: Markdown file to write the result to as well.
    """
    check_device(device)
    if min(conversations, rows, padded_rows, repetitions) < 1:
        raise UserError("--conversations, --rows, --padded_rows and --repetitions must be at least 1")
    config = dataclasses.replace(known_decoder(model), max_seq_len=seq_len)
    assert config.vocab_size is not None
    duplication = Duplication(layout=layout)
    shape = (repetitions + 1, conversations)  # of the turns; the first warms up
    lengths = np.random.default_rng(0).lognormal(np.log(median_tokens), spread, shape)
    lengths = lengths.clip(8, seq_len // 2).astype(np.int64)
    warm_up, *turns = (
        Turn.of(of_turn, config.vocab_size, duplication, seq_len, rows, padded_rows) for of_turn in lengths
    )
    seconds = Training(config, precision, torch.device(device)).measure(warm_up, turns)
    num_tokens = sum(turn.num_tokens for turn in turns)
    speeds = {
        name: [turn.num_tokens / taken for turn, taken in zip(turns, of_kind, strict=True)]
        for name, of_kind in seconds.items()
    }
    ratio = statistics.median(fast / slow for fast, slow in zip(speeds["packed"], speeds["padded"], strict=True))
    batches = {name: [batch for turn in turns for batch in turn.kinds[name]] for name in seconds}
    facts = [
        f"model: {config.num_parameters():,} parameters",
        f"{conversations} conversations a pass, of {lengths[1:].mean():.0f} tokens on average (median "
        f"{np.median(lengths[1:]):.0f}, longest {lengths[1:].max()}); {num_tokens / repetitions:,.0f} tokens with "
        "their copies",
        f"packed: rows of {seq_len:,}, {rows} a forward; padded: {padded_rows} documents a forward; "
        f"{repetitions} passes of each kind, in turns with other conversations each",
    ]
    body = [
        "| rows | share of real tokens | forwards a pass | median pass, s | median real tokens/s |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {num_tokens / sum(batch.input_ids.numel() for batch in batches[name]):.1%} "
            f"| {len(batches[name]) / repetitions:.0f} | {statistics.median(seconds[name]):.2f} "
            f"| {statistics.median(speeds[name]):,.0f} |"
            for name in seconds
        ),
        "",
        f"- packed / padded, tokens a second: {ratio:.2f} (median of the turns)",
    ]
    title = f"Packed and padded rows: {model}, {device}, {precision}, {layout}"
    publish(page("packing", title, device, facts=facts, body=body), output)


def _reader(lengths: np.ndarray, vocab_size: int, duplication: Duplication, seq_len: int) -> RowReader:
    """Reads random tokens; the last half of each sample, less the token that closes it, is the answer."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths.tolist():
        tokens = torch.randint(0, vocab_size - 1, (length,), generator=generator)
        samples.append((tokens, [Answer(length - 1 - length // 2, length - 1, length)]))
    return RowReader(
        [samples],
        duplication,
        seq_len=seq_len,
        mask_token_id=vocab_size - 1,
        pad_token_id=0,
        seed=0,
    )


@dataclass(frozen=True)
class Batch:
    """Rows of one forward; tensors [B, T]. Without documents each row is one, and what follows it is padding."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    documents: Documents | None = None

    @classmethod
    def packed(cls, reader: RowReader, rows: Sequence[Row]) -> "Batch":
        batch = reader.read(rows, rows, len(rows))
        return cls(batch["input_ids"], batch["labels"], batch["position_ids"], batch["documents"])

    @classmethod
    def padded(cls, documents: Sequence[Document]) -> "Batch":
        def pad(name: str, value: int) -> Tensor:
            rows = [getattr(document, name) for document in documents]
            return pad_sequence(rows, batch_first=True, padding_value=value)

        return cls(pad("input_ids", 0), pad("labels", IGNORE_INDEX), pad("position_ids", 0))


@dataclass(frozen=True)
class Turn:
    """The same documents as batches of packed and of padded rows."""

    kinds: dict[str, list[Batch]]
    num_tokens: int
    """Real ones, of each kind."""

    @classmethod
    def of(
        cls,
        lengths: np.ndarray,
        vocab_size: int,
        duplication: Duplication,
        seq_len: int,
        rows: int,
        padded_rows: int,
    ) -> "Turn":
        answers = np.stack([lengths // 2, np.ones_like(lengths)], axis=1)  # one closing token each
        index = ChatIndex(lengths, np.ones_like(lengths), answers, [len(lengths)])
        sizes = [Sizes.of(index, duplication, seq_len)]
        visits = [Visit(0, sample, 0) for sample in range(len(lengths))]
        row_list = pack_rows(visits, sizes, seq_len, duplication.layout)
        reader = _reader(lengths, vocab_size, duplication, seq_len)
        alone = [reader.document(key) for row in row_list for key in row.documents]
        random.Random(0).shuffle(alone)  # as they come, not by length
        num_tokens = sum(map(len, alone))
        assert num_tokens == sum(row.num_tokens for row in row_list), "both kinds hold the same documents"
        kinds = {
            "packed": [Batch.packed(reader, row_list[start : start + rows]) for start in range(0, len(row_list), rows)],
            "padded": [Batch.padded(alone[start : start + padded_rows]) for start in range(0, len(alone), padded_rows)],
        }
        return cls(kinds, num_tokens)


class Training:
    """One model and its optimizer; a pass is a full training step for each batch.

    Args:
        config: The model.
        precision: fp32, or bf16 by autocast.
        device: Where it is.
    """

    def __init__(self, config: DecoderConfig, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.bf16 = precision == "bf16"
        with device:
            self.decoder = Decoder(config)
        self.optimizer = AdamW(lr=1e-4).build(self.decoder)

    def measure(self, warm_up: Turn, turns: Sequence[Turn]) -> dict[str, list[float]]:
        """Seconds of each pass; the kinds take turns, in changing order."""
        for batches in warm_up.kinds.values():  # caches, optimizer states, large shapes
            self._pass(sorted(batches, key=lambda batch: -batch.input_ids.numel())[:2])
        seconds: dict[str, list[float]] = {name: [] for name in warm_up.kinds}
        for number, turn in enumerate(turns):
            for name in sorted(turn.kinds, reverse=number % 2 == 0):
                seconds[name].append(self._pass(turn.kinds[name]))
        return seconds

    def _pass(self, batches: Sequence[Batch]) -> float:
        def work() -> None:
            for batch in batches:
                self._step(batch)

        return seconds_of(work, self.device)

    def _step(self, batch: Batch) -> None:
        input_ids, labels, position_ids = (
            tensor.to(self.device, non_blocking=True) for tensor in (batch.input_ids, batch.labels, batch.position_ids)
        )
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            hidden = self.decoder(input_ids, position_ids, batch.documents)
            loss = self.decoder.lm_head.loss(hidden, labels)[0] / labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


if __name__ == "__main__":
    main(benchmark)
