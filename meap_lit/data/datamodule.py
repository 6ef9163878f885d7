"""The base of the datamodules: prepared datasets, micro-batches of the global batch, and the check of a resume."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from meap_lit import hub
from meap_lit.data.prepare.step import Preparation
from meap_lit.data.store.manifest import Kind, Manifest
from meap_lit.data.store.remote import Storage, scheme_of
from meap_lit.data.stream.loader import Loader
from meap_lit.data.stream.micro_batches import BatchReader, Slice, TrainStream, ValidationStream
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder, Visit
from meap_lit.data.stream.packing import PackedOrder
from meap_lit.errors import UserError, check_range
from meap_lit.files import parse_bytes
from meap_lit.tokenizer.tokenizer import Tokenizer


class StreamingData(L.LightningDataModule, ABC):
    """Prepared datasets, mixed by weight, as micro-batches of rows of `seq_len` tokens.

    Args:
        datasets: Prepared folder or s3:// address (made by `python -m meap_lit prepare ...`), or several with the
            weight of each.
        tokenizer: Folder of the tokenizer that the datasets were prepared with, or of a run, which keeps its own; or a
            Hub id (ORG/NAME or ORG/NAME@REVISION).
        seq_len: Tokens in a row of input.
        global_batch_size: Rows in one optimizer step, over all devices.
        micro_batch_size: Rows in one forward pass of one device.
        val_samples: Samples read at a validation (rows of text, conversations of chat); all that are held out if not
            given. Several datasets share them by weight, and each gives the first of its own, at least one.
        num_workers: Processes that read ahead, per device.
        seed: Seed of the order and the mix, and in fine-tuning of the masks.
        cache_dir: Folder that keeps chunks of remote datasets, on a disk of the node; its processes share it.
            `~/.cache/meap_lit` if not given.
        cache_bytes: Size that it may have, beside the chunks that are being read; null for no limit.
        storage_tries: Tries to read an object of a remote dataset, with growing pauses between them.
        storage_timeout: Seconds without a byte after which a try is given up; see `Storage`.
        storage_options: Arguments of the client of a remote dataset, of `boto3.client` for s3://. Endpoint, region and
            credentials are better left to the usual variables of the environment, see `Storage`.
        preparation: Steps that make what is missing (corpus, tokenizer, datasets) before the run starts.
    """

    kind: ClassVar[Kind]
    """Kind of samples in the datasets."""
    incidental: ClassVar[tuple[str, ...]] = (
        *("seed", "micro_batch_size", "num_workers", "preparation"),
        *("cache_dir", "cache_bytes", "storage_options", "storage_tries", "storage_timeout"),
    )
    """Options that do not decide what a run learns, beside a seed."""

    def __init__(
        self,
        datasets: str | dict[str, float],
        tokenizer: str,
        seq_len: int = 4096,
        global_batch_size: int = 256,
        micro_batch_size: int = 8,
        val_samples: int | None = None,
        num_workers: int = 2,
        seed: int = 0,
        cache_dir: str | None = None,
        cache_bytes: str | None = "100GB",
        storage_tries: int = 6,
        storage_timeout: float = 30.0,
        storage_options: dict[str, Any] | None = None,
        preparation: list[Preparation] | None = None,
    ) -> None:
        super().__init__()
        weights = {datasets: 1.0} if isinstance(datasets, str) else datasets
        self.datasets = {os.path.expanduser(path): weight for path, weight in weights.items()}
        self.tokenizer_folder = tokenizer
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.val_samples = val_samples
        self.num_workers = num_workers
        self.seed = seed
        self.storage = Storage(
            cache_dir,
            cache_bytes=None if cache_bytes is None else parse_bytes(cache_bytes, "data.cache_bytes"),
            tries=storage_tries,
            timeout=storage_timeout,
            options=storage_options or {},
        )
        self.preparation = preparation or []
        self.resumes = False
        """Whether the run continues another one."""
        check_range("data.storage_tries", storage_tries, "[1, inf)")
        check_range("data.storage_timeout", storage_timeout, "(0, inf)", " seconds")
        if not self.datasets:
            raise UserError("data.datasets names no dataset; name a folder, or several with the weight of each")
        for path, weight in self.datasets.items():
            if "://" in path:
                try:
                    scheme_of(path)
                except UserError as error:
                    raise UserError(f"data.datasets: {error}") from error
            check_range(f"data.datasets: the weight of {path}", weight, "(0, inf)")
        smallest = {"seq_len": 1, "global_batch_size": 1, "micro_batch_size": 1, "val_samples": 1, "num_workers": 0}
        for name, limit in smallest.items():
            check_range(f"data.{name}", getattr(self, name), f"[{limit}, inf)")

    def rows_in(self, epochs: int) -> int:
        """Return the number of rows that so many epochs over the datasets fill."""
        return self.order().num_rows(epochs)

    @abstractmethod
    def describe_rows(self, start: int, stop: int) -> str:
        """Describe the rows from `start` to `stop` - 1, such as `3 rows (conversations: 11)`."""

    @property
    def row_settings(self) -> dict[str, Any]:
        """Settings that decide the rows of a step; a resume counts steps, so they must not change."""
        total = sum(self.datasets.values())
        shares = [round(weight / total, 12) for weight in self.datasets.values()]
        return {
            "seq_len": self.seq_len,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            "datasets (share of each)": shares,
        }

    @property
    @abstractmethod
    def longest_input(self) -> int:
        """Length of the longest span of tokens that attend to each other; the model's context must hold it."""

    @property
    @abstractmethod
    def mean_span(self) -> float:
        """Mean length of the spans that attend to each other, weighted by tokens; it decides the cost of attention."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the recipe, read at first use (preparation may have to make it first)."""
        return Tokenizer.load(self.tokenizer_folder)

    @property
    def tokens_per_step(self) -> int:
        """Number of input tokens in one optimizer step."""
        return self.global_batch_size * self.seq_len

    def accumulation(self, num_replicas: int) -> int:
        """Return the number of micro-batches of each of `num_replicas` devices in one optimizer step."""
        per_pass = self.micro_batch_size * num_replicas
        if self.global_batch_size % per_pass:
            rows, left = divmod(self.global_batch_size, num_replicas)
            fitting = next(number for number in range(self.micro_batch_size, 0, -1) if rows % number == 0)
            raise UserError(
                f"data.global_batch_size {self.global_batch_size} cannot be divided by data.micro_batch_size "
                f"{self.micro_batch_size} x {num_replicas} devices = {per_pass}; "
                + ("take a number of devices that divides it" if left else f"set data.micro_batch_size to {fitting}")
            )
        return self.global_batch_size // per_pass

    def prepare_data(self) -> None:
        for step in self.preparation:
            step.ensure(check_sources=not self.resumes)  # a checkpoint refuses other datasets by their content
        hub.download(self.tokenizer_folder, "tokenizer", hub.TOKENIZER_FILES)

    def setup(self, stage: str) -> None:
        if self.trainer is not None:  # all ranks read the revisions that the first one found
            hub.remember(self.trainer.strategy.broadcast(hub.commits()))
        self.manifests = {path: Manifest.load(path, self.storage, kind=self.kind) for path in self.datasets}
        for path, manifest in self.manifests.items():
            if manifest.part is not None:
                raise UserError(
                    f"dataset {path} is part {manifest.part.index}/{manifest.part.count} of a dataset; merge the parts "
                    f"with: python -m meap_lit prepare merge --input PARTS --output DIR"
                )
            manifest.check_tokenizer(self.tokenizer, dataset=path, tokenizer_folder=self.tokenizer_folder)
            if "val" not in manifest.splits:
                rank_zero_info(f"dataset {path} has no validation split; val/loss does not include it")

    def check_alike(self, found: list[dict[str, str]]) -> None:
        """Check that all ranks read the same datasets.

        Every rank computes the order of all rows, so different datasets would give overlapping or missing rows.

        Args:
            found: `fingerprints` of each rank, in rank order.

        Raises:
            UserError: If the fingerprints of a rank differ from those of rank 0.
        """
        first = list(found[0].values())  # a home folder may have another name on another node
        for rank, fingerprints in enumerate(found):
            for number, (path, fingerprint) in enumerate(fingerprints.items()):
                if fingerprint != first[number]:
                    raise UserError(
                        f"dataset {path} on rank {rank} is not that of rank 0 (contents differ); all ranks must read "
                        f"the same, so copy it again to the node of rank {rank}"
                    )

    @property
    def samples_seen(self) -> int:
        """Number of rows in the optimizer steps so far, over all devices."""
        return self.trainer.global_step * self.global_batch_size

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.trainer.global_step,
            "samples": self.samples_seen,
            "datasets": self.fingerprints,
            "rows": self.row_settings,
        }

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of the content of the datasets, by path."""
        return {path: manifest.fingerprint for path, manifest in self.manifests.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse the checkpoint of a run on other rows. Nothing is restored: the step decides the next rows."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # a model may be validated on any data
        now = self.fingerprints
        if list(state_dict["datasets"].values()) != list(now.values()):
            raise UserError(
                f"the checkpoint was trained on other data: {', '.join(state_dict['datasets'])} then, "
                f"{', '.join(now)} now (contents differ); resume with the same datasets, or start a new run"
            )
        # an older checkpoint does not name all of them
        then = {"global_batch_size": state_dict["samples"] // max(1, state_dict["step"]), **state_dict["rows"]}
        for name, value in self.row_settings.items():
            was = then.get(name, value)
            if was != value:
                raise UserError(
                    f"data.{name} was {was} in the run of the checkpoint and is {value} now, which changes the rows of "
                    f"its steps; leave it as it was, or start a new run with model.init_from"
                )

    @property
    def paths_with_val(self) -> list[str]:
        """Datasets that have a validation split."""
        return self._paths_with("val")

    @cached_property
    def names(self) -> dict[str, str]:
        """Return a short name of each dataset, by path, for what is logged of it."""
        return dict(zip(self.datasets, short_names(list(self.datasets)), strict=True))

    @cached_property
    def val_counts(self) -> dict[str, int]:
        """Return how many samples a validation reads of each dataset that has a validation split, by path."""
        available = {path: len(self._val_labels(path)) for path in self.paths_with_val}
        if self.val_samples is None:
            return available
        if self.val_samples < len(available):
            raise UserError(
                f"data.val_samples {self.val_samples} is less than one for each of the {len(available)} datasets with "
                f"a validation split; raise it to {len(available)} or more"
            )
        weights = [self.datasets[path] for path in available]
        return dict(zip(available, share_out(self.val_samples, weights, [*available.values()]), strict=True))

    @cached_property
    def val_shares(self) -> dict[str, float]:
        """Return the share of the mixture's supervised tokens that each dataset with a validation split gives, by name.

        The weights of the mixture are shares of samples; the loss is a mean over tokens, in training as here. So the
        validation loss is that of the mixture however many samples of each dataset were read.
        """
        counts = self.val_counts
        tokens = [self.datasets[path] * float(self._val_labels(path)[:count].mean()) for path, count in counts.items()]
        return {self.names[path]: of_one / sum(tokens) for path, of_one in zip(counts, tokens, strict=True)}

    @abstractmethod
    def order(self) -> MixedOrder | PackedOrder:
        """Return the endless line of training rows."""

    @abstractmethod
    def _chunk_sizes(self, path: str) -> list[int]:
        """Return the number of training samples in each chunk of a dataset."""

    @abstractmethod
    def _reader(self, split: Literal["train", "val"]) -> BatchReader:
        """Return what reads rows of a split into batches."""

    @abstractmethod
    def _val_labels(self, path: str) -> np.ndarray:
        """Return the supervised tokens of each sample in the validation split of a dataset, [N]."""

    def _val_rows(self, visits: list[list[Visit]]) -> Sequence[Sequence[Any]]:
        """Return the rows of a validation, given the samples that it reads of each dataset."""
        return visits

    def _mixed_samples(self) -> MixedOrder:
        """Return the endless line of samples of all datasets."""
        paths = enumerate(self.datasets)
        orders = [ShuffledOrder(self._chunk_sizes(path), (self.seed, number)) for number, path in paths]
        return MixedOrder(orders, list(self.datasets.values()), self.seed)

    def _paths_with(self, split: Literal["train", "val"]) -> list[str]:
        return [path for path in self.datasets if split in self.manifests[path].splits]

    @abstractmethod
    def example_prompt(self) -> str | None:
        """Return a text to continue, from the first held-out sample; None if no dataset has a validation split."""

    @property
    def rank_slice(self) -> Slice:
        """The slice of each global batch that this process reads."""
        # Lightning keeps the data-parallel rank here: with tensor parallelism it is not the global rank
        kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return Slice(rank=kwargs.get("rank", 0), num_replicas=kwargs.get("num_replicas", 1))

    def train_stream(self, rank_slice: Slice, start: int) -> TrainStream:
        """Return the micro-batches of training that a rank reads after the first `start` rows of the run."""
        return TrainStream(
            self.order(),
            self._reader("train"),
            rank_slice=rank_slice,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            start=start,
        )

    def train_dataloader(self) -> DataLoader:
        stream = self.train_stream(self.rank_slice, start=self.samples_seen)
        return Loader(stream, self.num_workers, pin_memory=self._on_gpu)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.paths_with_val:
            if self.trainer.state.fn == "validate":
                raise UserError(
                    "no dataset of data.datasets has a validation split; prepare one with --val_share above 0"
                )
            return []
        counts = self.val_counts.values()
        visits = [[Visit(source, sample, 0) for sample in range(count)] for source, count in enumerate(counts)]
        stream = ValidationStream(
            self._val_rows(visits),
            self._reader("val"),
            rank_slice=self.rank_slice,
            micro_batch_size=self.micro_batch_size,
        )
        return Loader(stream, num_workers=0, pin_memory=self._on_gpu)  # workers would start anew at every validation

    @property
    def _on_gpu(self) -> bool:
        return self.trainer.strategy.root_device.type == "cuda"


def share_out(number: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Share out a number of samples by weight, by Sainte-Laguë's method: exact wherever the shares are whole numbers.

    Each source gets at least one. What it lacks of its share, having fewer `available`, goes to the others.
    """
    counts = [1] * len(weights)
    for _ in range(min(number, sum(available)) - len(counts)):
        open_ = [source for source, count in enumerate(counts) if count < available[source]]
        counts[max(open_, key=lambda source: weights[source] / (2 * counts[source] + 1))] += 1
    return counts


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last component of each path, or as many of them as tell all paths apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)  # one folder, spelled in two ways
