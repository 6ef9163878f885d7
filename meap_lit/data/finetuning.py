"""The LitData streaming datamodule for fine-tuning: conversations, duplicated, masked and packed."""

import dataclasses
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from meap_lit.data.datamodule import StreamingData
from meap_lit.data.store.manifest import load_samples
from meap_lit.data.stream.chat import ChatSamples, RowReader
from meap_lit.data.stream.order import Visit
from meap_lit.data.stream.packing import PackedOrder, Row, Sizes, pack_rows
from meap_lit.errors import UserError
from meap_lit.masking.duplication import Duplication
from meap_lit.tokenizer.chat_template import ChatTemplate

_PLAIN = Duplication(mask_ratio=0.0)


class FineTuningData(StreamingData):
    """Prepared conversations, each with or without its masked copy, packed into rows of `seq_len` tokens.

    Args:
        duplication: How samples are duplicated and masked.
        **kwargs: As for `StreamingData`.
    """

    kind = "chat"

    def __init__(self, duplication: Duplication, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.duplication = duplication

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.indexes = {
            (path, name): load_samples(path, name, self.storage, split.files)
            for path, manifest in self.manifests.items()
            for name, split in manifest.splits.items()
        }
        for (path, split), index in self.indexes.items():
            longest = int(index.num_tokens.max())
            if longest > self.seq_len:
                raise UserError(
                    f"dataset {path} ({split}) holds a sample of {longest} tokens, longer than data.seq_len "
                    f"{self.seq_len}; raise it, or prepare the dataset with --max_tokens {self.seq_len}"
                )
        self.sizes = [Sizes.of(self.indexes[path, "train"], self.duplication, self.seq_len) for path in self.datasets]
        self._check_room()
        self._adopt_template()

    def _check_room(self) -> None:
        for path, sizes in zip(self.datasets, self.sizes, strict=True):
            crowded = sizes.without_room
            if not crowded.any():
                continue
            what = (
                f"{crowded.sum()} of {len(crowded)} samples of dataset {path} do not fit twice into data.seq_len "
                f"{self.seq_len}, the longest has {sizes.num_tokens[crowded].max()} tokens"
            )
            if self.duplication.no_room == "stop":
                ways = "data.duplication.no_room to skip_copy or data.duplication.layout to separate"
                raise UserError(f"{what}; raise it, or set {ways}")
            rank_zero_info(f"{what}; they have no copy")

    def _adopt_template(self) -> None:
        """Make the template of the data the tokenizer's own, so that it is saved with the model."""
        details = {path: manifest.chat for path, manifest in self.manifests.items() if manifest.chat is not None}
        if len({chat.template_source for chat in details.values()}) > 1:
            named = ", ".join(f"{path} ({chat.template})" for path, chat in details.items())
            raise UserError(
                f"data.datasets were prepared with different chat templates: {named}; prepare them with one"
            )
        chat = next(iter(details.values()))
        self.tokenizer.chat_template = chat.template_source
        template = ChatTemplate.load("tokenizer", self.tokenizer)
        self.stop_token_ids = sorted({self.tokenizer.eos_token_id, *template.stop_token_ids})

    def example_prompt(self) -> str | None:
        if not self.paths_with_val:
            return None
        input_ids, answers = self._open(self.paths_with_val[0], "val")[0]
        # the sample holds the message as the template writes it
        template, message = ChatTemplate.load("tokenizer", self.tokenizer), "MESSAGE"
        around = self._text(template.encode_prompt([{"role": "user", "content": message}])).partition(message)
        prompt = self._text(input_ids[: answers[0].start].tolist())
        return prompt.removeprefix(around[0]).removesuffix(around[2]).strip()

    def _text(self, input_ids: list[int]) -> str:
        return self.tokenizer.decode(input_ids, skip_special_tokens=True)

    @property
    def row_settings(self) -> dict[str, Any]:
        return {**super().row_settings, "duplication": dataclasses.asdict(self.duplication)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = dict(state_dict["rows"])
        if "duplication" in rows:  # an older checkpoint does not name all of its options
            rows["duplication"] = {**dataclasses.asdict(Duplication()), **rows["duplication"]}
        super().load_state_dict({**state_dict, "rows": rows})

    def describe_rows(self, start: int, stop: int) -> str:
        rows = list(islice(self.order().iterate(start), stop - start))
        conversations = sum(document.has_original for row in rows for document in row.documents)
        return f"{len(rows)} row{'s' if len(rows) > 1 else ''} (conversations: {conversations})"

    @property
    def longest_input(self) -> int:
        """Largest position of any document, plus 1; a packed row may be longer than the model's context."""
        longest = max(int(index.num_tokens.max()) for index in self.indexes.values())
        if self.duplication.layout == "concat" and self.duplication.copy_positions == "continued":
            longest = max(longest, *(int(sizes.spans("concat").max()) for sizes in self.sizes))
        return longest

    @cached_property
    def mean_span(self) -> float:
        spans = np.concatenate([sizes.spans(self.duplication.layout) for sizes in self.sizes])
        return float((spans**2).sum() / spans.sum())

    def order(self) -> PackedOrder:
        return PackedOrder(
            self._mixed_samples(),
            self.sizes,
            seq_len=self.seq_len,
            layout=self.duplication.layout,
            seed=self.seed,
        )

    def _chunk_sizes(self, path: str) -> list[int]:
        return self.indexes[path, "train"].chunk_sizes

    def _reader(self, split: Literal["train", "val"]) -> RowReader:
        return RowReader(
            [self._open(path, split) for path in self._paths_with(split)],
            self.duplication if split == "train" else _PLAIN,
            seq_len=self.seq_len,
            mask_token_id=self.tokenizer.mask_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            seed=self.seed,
        )

    def _open(self, path: str, split: str) -> ChatSamples:
        files = self.manifests[path].splits[split].files
        return ChatSamples(f"{path.rstrip('/')}/{split}", self.tokenizer.vocab_size, self.storage, files)

    def _val_labels(self, path: str) -> np.ndarray:
        return self._val_sizes(path).num_supervised

    def _val_rows(self, visits: list[list[Visit]]) -> list[list[Row]]:
        sizes = [self._val_sizes(path) for path in self.paths_with_val]
        return [pack_rows(of_one, sizes, self.seq_len, _PLAIN.layout) for of_one in visits]

    def _val_sizes(self, path: str) -> Sizes:
        return Sizes.of(self.indexes[path, "val"], _PLAIN, self.seq_len)
