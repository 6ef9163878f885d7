"""Open a source of weights: a Hugging Face folder, a checkpoint of ours, or a run.

Only safetensors and checkpoints without code are read, and opening reads no more than their headers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from meap_lit.checkpoint.checksums import INDEX, check
from meap_lit.checkpoint.find import newest_checkpoint
from meap_lit.checkpoint.folder import StoredCheckpoint
from meap_lit.errors import UserError
from meap_lit.files import local_path
from meap_lit.hf.config import family
from meap_lit.hf.folder import CONFIG_FILE, PICKLED, WEIGHTS_FILE, HFFolder, foreign_format, pickle_refusal
from meap_lit.hf.weights import EMBEDDING, HEAD, WeightSource, copy_rows
from meap_lit.hub import is_pinned, local_folder
from meap_lit.model.config import DecoderConfig, RopeScaling, vocab_rows
from meap_lit.model.lora import LoRA, is_adapter
from meap_lit.tokenizer.tokenizer import MASK_TOKEN, Tokenizer, id_of_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIX = "decoder."


def open_source(path: str | Path, verify: bool = True) -> WeightSource:
    """Open the weights under `path`.

    Args:
        path: A Hugging Face folder (config.json and safetensors), the id of a repository on the Hub, a checkpoint
            (.ckpt), the folder of a run (`runs/NAME/version_0`), or the folder above (`runs/NAME`) for its newest run
            with a checkpoint.
        verify: Compare a checkpoint of a run with the hashes that it carries; if false, with the sizes only. Hugging
            Face folders carry no hashes.

    Raises:
        UserError: If `path` does not exist or cannot be downloaded, holds no weights, is damaged, or holds a model that
            the decoder does not support.
    """
    path = local_folder(path, "checkpoint")
    if path.is_file() or (path / INDEX).is_file():
        return CheckpointSource.open(_behind_link(path), verify)
    if (path / CONFIG_FILE).is_file():
        return HFFolder.open(path)
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(_what_it_is(path))
    return CheckpointSource.open(newest, verify)


def vocab_size_for(source: WeightSource, tokenizer: Tokenizer) -> int:
    """Return the vocabulary rows of a decoder that starts from `source` and reads what `tokenizer` writes.

    These are the source's own rows. If the mask token is new and has no room among them, it is the next multiple of 64.

    Raises:
        UserError: If the tokenizer has more ids, a new mask token aside, than the source has rows, or is not that of
            the source.
    """
    check_tokenizer(tokenizer, source.tokenizer_folder, source.path)
    stated = source.config.vocab_size
    assert stated is not None
    rows = vocab_rows(tokenizer.vocab_size, stated, new_tokens=tokenizer.mask_is_new)
    if rows is None:
        raise UserError(
            f"checkpoint {source.path} has {stated} vocabulary rows, too few for the "
            f"{tokenizer.vocab_size - tokenizer.mask_is_new} ids of tokenizer {tokenizer.path}; name the tokenizer "
            f"that belongs to the checkpoint"
        )
    return rows


def check_tokenizer(tokenizer: Tokenizer, trained_with: Path | None, checkpoint: Path) -> None:
    """Compare a tokenizer with the one that a checkpoint was trained with.

    Args:
        tokenizer: The tokenizer of the text that the model is going to read.
        trained_with: Folder of the tokenizer of the training; nothing is compared if it is None or cannot be read.
        checkpoint: The checkpoint, for the message.

    Raises:
        UserError: If an id has another token: the model would read nonsense, without an error.
    """
    if trained_with is None or Path(tokenizer.path).absolute() == trained_with.absolute():
        return
    try:
        other = tokenizers.Tokenizer.from_file(str(trained_with / "tokenizer.json"))
    except Exception:  # the library raises nothing more special; only a tokenizer that is used has to be readable
        return
    difference = tokenizer.first_difference(other)
    if difference is not None:
        token_id, token, its_token = difference
        raise UserError(
            f"tokenizer {tokenizer.path} is not that of checkpoint {checkpoint}: its id {token_id} is {token!r}, and "
            f"the model was trained with {its_token!r}; set data.tokenizer (or --tokenizer) to {trained_with}, and "
            f"prepare the data with it"
        )


def tokenizer_of(source: WeightSource, path: str | None = None) -> Tokenizer:
    """Return the tokenizer at `path`, the one of the source if not given; raise `UserError` if it does not fit."""
    folder = path or source.tokenizer_folder
    if folder is None:
        raise UserError(f"checkpoint {source.path} has no tokenizer; name that of its training with --tokenizer")
    tokenizer = Tokenizer.load(str(folder))
    vocab_size_for(source, tokenizer)  # refuses the tokenizer of another model
    return tokenizer


def new_mask_token(source: WeightSource, tokenizer: Tokenizer) -> int | None:
    """Return the id of the mask token if `source` has not been trained with it, so that its row starts anew.

    A tokenizer without a mask token gets one in memory. A run of ours that masked inputs has trained its row all the
    same, and its export has the token in its tokenizer: these rows are kept. A plain run never read the row, and its
    export does not have it.
    """
    mask = tokenizer.mask_token_id
    if not tokenizer.mask_is_new:
        return None
    if isinstance(source, CheckpointSource):
        was_masked = source.rows_without_mask is None
        return None if was_masked and source.mask_token_id == mask else mask
    folder = source.tokenizer_folder
    return None if folder is not None and id_of_token(folder, MASK_TOKEN) == mask else mask


def _behind_link(path: Path) -> Path:
    """Return the checkpoint that `last.ckpt` names now: a run that continues will move the link to another one."""
    return path.parent / path.readlink() if path.is_symlink() else path


def _what_it_is(path: Path) -> str:
    """Say why a folder cannot be opened."""
    if foreign := foreign_format(path):
        return foreign
    if any(path.glob("*.safetensors")):
        return f"{path} has no {CONFIG_FILE}, which describes the model of its safetensors"
    return (
        f"{path} holds no checkpoint; name a Hugging Face folder ({CONFIG_FILE}, {WEIGHTS_FILE}), "
        f"a run (checkpoints/step=N.ckpt) or a .ckpt"
    )


# ------------------------------------------------------------------------------------------ our checkpoints


@dataclass(frozen=True, kw_only=True)
class CheckpointSource(WeightSource):
    """A checkpoint that one of our modules wrote: `decoder.*` in the state, the configuration under "decoder".

    With adapters, `read` returns the merged weight. Whole weights that the checkpoint does not hold come from the model
    that training started from, its vocabulary grown again as it was then.

    Args:
        mask_token_id: Id of the mask token in training.
        rows_without_mask: Vocabulary rows that the model would have without the mask token, if that was added to the
            tokenizer and no input was masked; None otherwise.
        init_from: Path of the model that training started from, or its Hub id with the commit.
        base: That model, if its weights are needed.
        lora: The adapters' rank, scale and targets.
        first_new_token: As `load_weights` got it when training started.
        stored: The checkpoint on disk.
        weights: Shape and dtype of each weight that it holds.
        has_mask: Give the rows of the vocabulary that only the mask token needs; see `without_mask`.
    """

    mask_token_id: int | None
    rows_without_mask: int | None
    init_from: str | None
    base: WeightSource | None
    lora: LoRA | None
    first_new_token: int | None
    stored: StoredCheckpoint = field(repr=False)
    weights: Mapping[str, TensorStorageMetadata] = field(repr=False)
    has_mask: bool = True

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> "CheckpointSource":
        """Read all but the weights, which are only compared with their checksums.

        Raises:
            UserError: If it is damaged, not ours, or needs a model that does not exist.
        """
        _refuse_format(path)
        check(path, hashes=verify)
        stored = StoredCheckpoint(path)
        about = stored.trainer_state.get("decoder")
        if about is None:
            raise UserError(f"checkpoint {path} is not one of meap_lit: it has no decoder in it")
        all_weights = stored.weights.items()
        weights = {name.removeprefix(_PREFIX): tensor for name, tensor in all_weights if name.startswith(_PREFIX)}
        try:
            config = _decoder_config(about["config"])
            lora = LoRA(**about["lora"]) if about.get("lora") or any(map(is_adapter, weights)) else None
            dtype = DTYPES[about["dtype"]] if about.get("dtype") else next(iter(weights.values())).properties.dtype
        except (AttributeError, KeyError, StopIteration, TypeError) as error:
            raise UserError(f"checkpoint {path} does not describe its decoder as meap_lit does ({error!r})") from error
        # a model that was adapted from random weights has all of them in its own checkpoint
        init_from = about.get("init_from")
        tokenizer = path.absolute().parent.parent / "tokenizer"
        return cls(
            path=path,
            config=config,
            model_type=family(config, about.get("model_type")),
            dtype=dtype,
            tokenizer_folder=tokenizer if (tokenizer / "tokenizer.json").is_file() else None,
            generation=about.get("generation") or {},
            positions=about.get("positions") or {},
            tokens_seen=about.get("tokens_seen"),
            mask_token_id=about.get("mask_token_id"),
            rows_without_mask=about.get("rows_without_mask"),
            init_from=init_from,
            base=_open_base(path, init_from, about.get("base"), verify) if lora and init_from else None,
            lora=lora,
            first_new_token=about.get("first_new_token"),
            stored=stored,
            weights=weights,
        )

    def names(self) -> list[str]:
        whole = [name for name in self.weights if not is_adapter(name)]
        return list(dict.fromkeys([*(self.base.names() if self.base else []), *whole]))

    def without_mask(self) -> "CheckpointSource":
        """Return the same weights with `rows_without_mask` rows of the vocabulary."""
        return replace(self, config=replace(self.config, vocab_size=self.rows_without_mask), has_mask=False)

    def shape(self, name: str) -> tuple[int, ...]:
        is_own = name in self.weights
        shape = tuple(self.weights[name].size) if is_own or self.base is None else self.base.shape(name)
        if name not in (EMBEDDING, HEAD) or (is_own and self.has_mask):
            return shape
        return (self.config.vocab_size or 0, *shape[1:])

    def read(self, name: str) -> Tensor:
        """Return one parameter; a merged one is float32, so that the caller's cast is the only rounding."""
        weight = self._read_own(name) if name in self.weights else self.read_base(name)
        if not self.has_mask and name in (EMBEDDING, HEAD):
            return weight[: self.config.vocab_size]
        layer = name.removesuffix(".weight")
        if self.lora is None or f"{layer}.lora_a" not in self.weights:
            return weight
        lora_a, lora_b = (self._read_own(f"{layer}.{part}").float() for part in ("lora_a", "lora_b"))
        return weight.float() + self.lora.scale * (lora_b @ lora_a)

    def _read_own(self, name: str) -> Tensor:
        return self.stored.read_weight(_PREFIX + name)

    def read_base(self, name: str) -> Tensor:
        """Return one parameter as it was when training started, vocabulary rows in float32 as training has them."""
        assert self.base is not None
        weight = self.base.read(name)
        if name not in (EMBEDDING, HEAD):
            return weight
        rows = torch.empty(self.shape(name))
        copy_rows(rows, weight[: len(rows)], self.first_new_token)  # the base may have a row for a mask token
        return rows

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return name and value of each parameter that the checkpoint itself holds, adapters aside."""
        return ((name, self._read_own(name)) for name in self.weights if not is_adapter(name))

    def adapters(self) -> dict[str, Tensor]:
        """Return the adapters, `lora_a` [rank, in] and `lora_b` [out, rank] of each target, by name."""
        return {name: self._read_own(name) for name in self.weights if is_adapter(name)}


def _decoder_config(content: Mapping[str, Any]) -> DecoderConfig:
    scaling = content.get("rope_scaling")
    return DecoderConfig(**{**content, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def _open_base(file: Path, init_from: str, fingerprint: str | None, verify: bool) -> WeightSource:
    """Open the model of adapters; `fingerprint` is that of its weights, unless an earlier version wrote them."""
    try:
        if not local_path(init_from).exists() and not is_pinned(init_from):
            # a path like ORG/NAME that is gone: anybody may have made a repository of that name
            raise UserError(f"checkpoint {init_from} does not exist")
        base = open_source(init_from, verify)
        if fingerprint not in (None, base.fingerprint()):
            # such as a run of the same name in another folder, or one that was trained again
            raise UserError(f"{base.path} has other weights than the model that they were trained on")
        return base
    except UserError as error:
        raise UserError(
            f"checkpoint {file} holds adapters, and their model cannot be opened: {error}; restore that model"
        ) from error


def _refuse_format(file: Path) -> None:
    """Refuse a weight file that is not a checkpoint of a run."""
    if file.suffix in PICKLED:
        raise UserError(pickle_refusal(file))
    if file.suffix == ".safetensors":
        raise UserError(f"{file} is a weight file; name the folder that also holds its {CONFIG_FILE}")
