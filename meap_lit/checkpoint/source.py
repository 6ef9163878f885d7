"""Whatever holds weights, opened as one thing: a folder of Hugging Face, a checkpoint of ours, a run.

Only safetensors and checkpoints without code are read, and on opening no more than their headers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meap_lit.checkpoint.checksums import SHARDS_INDEX, check, read_file
from meap_lit.checkpoint.find import newest_checkpoint
from meap_lit.checkpoint.shards import read_index, read_trainer_state, read_weight, weights_in
from meap_lit.errors import UserError
from meap_lit.hf.config import family
from meap_lit.hf.folder import CONFIG_FILE, PICKLED, WEIGHTS_FILE, HFFolder, foreign_format, pickle_refusal
from meap_lit.hf.weights import EMBEDDING, HEAD, WeightSource, build_decoder, copy_rows, load_weights
from meap_lit.model.config import DecoderConfig, RopeScaling, vocab_rows
from meap_lit.model.lora import LoRA, is_adapter
from meap_lit.tokenizer.tokenizer import MASK_TOKEN, Tokenizer, id_of_token

__all__ = [
    "Checkpoint",
    "WeightSource",
    "build_decoder",
    "load_weights",
    "new_mask_token",
    "open_source",
    "vocab_size_for",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIX = "decoder."
_MAX_MAPPED = 128 << 20
"""Bytes read from a mapped checkpoint before it is mapped anew, which gives their memory back."""


def open_source(path: str | Path, verify: bool = True) -> WeightSource:
    """Open the weights under `path`.

    Args:
        path: A folder of Hugging Face (config.json and safetensors), a checkpoint file (.ckpt), the folder of a run
            (`runs/NAME/version_0`), or the folder above (`runs/NAME`), which stands for its newest run with a
            checkpoint.
        verify: Compare a checkpoint of a run with the hashes that it carries; if not, with their sizes only. Hugging
            Face's folders carry none.

    Raises:
        UserError: If there is nothing of the kind, it is damaged, or it is of a model that the decoder is not.
    """
    path = Path(path).expanduser()
    if path.is_file() or (path / SHARDS_INDEX).is_file():
        return Checkpoint.open(_behind_link(path), verify)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / CONFIG_FILE).is_file():
        return HFFolder.open(path)
    newest = newest_checkpoint(path)
    if newest is None:
        raise UserError(_what_it_is(path))
    return Checkpoint.open(newest, verify)


def vocab_size_for(source: WeightSource, tokenizer: Tokenizer) -> int:
    """Vocabulary rows of a decoder that starts from `source` and reads what `tokenizer` writes.

    The source's own; where the mask token is new and finds no room, the next multiple of 64.

    Raises:
        UserError: If the tokenizer has more ids, a new mask token aside, than the source has rows.
    """
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


def new_mask_token(source: WeightSource, tokenizer: Tokenizer) -> int | None:
    """Return the id of the mask token if `source` has not been trained with it, so that its row starts anew.

    A tokenizer without a mask token gets one in memory. A run of ours that masked inputs knows its mask token all the
    same, and its export has it in its own tokenizer: their row is kept. That of a plain run was never read, and the
    export of one is without it.

    Args:
        source: Where a training starts from.
        tokenizer: The tokenizer of its data.
    """
    mask = tokenizer.mask_token_id
    if not tokenizer.mask_is_new:
        return None
    if isinstance(source, Checkpoint):
        was_masked = source.rows_without_mask is None
        return None if was_masked and source.mask_token_id == mask else mask
    folder = source.tokenizer_folder
    return None if folder is not None and id_of_token(folder, MASK_TOKEN) == mask else mask


def _behind_link(file: Path) -> Path:
    """The checkpoint that `last.ckpt` stands for now: a run that goes on will turn the link to another one."""
    return file.parent / file.readlink() if file.is_symlink() else file


def _what_it_is(path: Path) -> str:
    """Why a folder cannot be opened."""
    if foreign := foreign_format(path):
        return foreign
    if any(path.glob("*.safetensors")):
        return f"{path} has no {CONFIG_FILE}, which says what model its safetensors are of"
    return (
        f"{path} holds no checkpoint; name a Hugging Face folder ({CONFIG_FILE}, {WEIGHTS_FILE}), "
        f"a run (checkpoints/step=N.ckpt) or a .ckpt"
    )


# ------------------------------------------------------------------------------------------ our checkpoints


@dataclass(frozen=True, kw_only=True)
class Checkpoint(WeightSource):
    """A checkpoint that one of our modules wrote: `decoder.*` in the state, the configuration under "decoder".

    With adapters, `read` gives the merged weight. Whole weights that are not in the file come from the model that
    training started from, its vocabulary grown again as it was then.

    Args:
        mask_token_id: Id of the mask token in training.
        rows_without_mask: Vocabulary rows that the model would have without the mask token, if that was added to the
            tokenizer and no input was masked; None otherwise.
        init_from: Path of the model that training started from.
        base: That model, if its weights are needed.
        lora: What the adapters are like.
        first_new_token: As `load_weights` got it when training started.
    """

    mask_token_id: int | None
    rows_without_mask: int | None
    init_from: str | None
    base: WeightSource | None
    lora: LoRA | None
    first_new_token: int | None
    state: "_MappedState | _ShardedState" = field(repr=False)

    @classmethod
    def open(cls, file: Path, verify: bool = True) -> "Checkpoint":
        """Read all but the weights, which are only compared with their checksums.

        Raises:
            UserError: If it is damaged, not ours, or needs a model that is not there.
        """
        _refuse_format(file)
        check(file, hashes=verify)
        state = _ShardedState(file) if file.is_dir() else _MappedState(file)
        try:
            about = state.about
            config = _decoder_config(about["config"])
            lora = LoRA(**about["lora"]) if about.get("lora") or any(map(is_adapter, state.tensors)) else None
            stored = about.get("dtype")
            dtype = DTYPES[stored] if stored else next(iter(state.tensors.values())).dtype
        except (AttributeError, KeyError, StopIteration, TypeError) as error:
            raise UserError(f"checkpoint {file} does not describe its decoder as meap_lit does ({error!r})") from error
        # a model that was adapted from random weights has all of them in its own checkpoint
        init_from = about.get("init_from")
        tokenizer = file.absolute().parent.parent / "tokenizer"
        return cls(
            path=file,
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
            base=_open_base(file, init_from, verify) if lora and init_from else None,
            lora=lora,
            first_new_token=about.get("first_new_token"),
            state=state,
        )

    def names(self) -> list[str]:
        whole = [name for name in self.state.tensors if not is_adapter(name)]
        return list(dict.fromkeys([*(self.base.names() if self.base else []), *whole]))

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.state.tensors or self.base is None:
            return tuple(self.state.tensors[name].shape)
        shape = self.base.shape(name)
        return (self.config.vocab_size or 0, *shape[1:]) if name in (EMBEDDING, HEAD) else shape

    def read(self, name: str) -> Tensor:
        """One parameter; a merged one is float32, so that the caller's cast is the only rounding."""
        weight = self.state.read(name) if name in self.state.tensors else self.read_base(name)
        layer = name.removesuffix(".weight")
        if self.lora is None or f"{layer}.lora_a" not in self.state.tensors:
            return weight
        lora_a, lora_b = (self.state.read(f"{layer}.{part}").float() for part in ("lora_a", "lora_b"))
        return weight.float() + self.lora.scale * (lora_b @ lora_a)

    def read_base(self, name: str) -> Tensor:
        """One parameter as it was when training started, vocabulary rows in float32 as training has them."""
        assert self.base is not None
        weight = self.base.read(name)
        if name not in (EMBEDDING, HEAD):
            return weight
        rows = torch.empty(self.shape(name))
        copy_rows(rows, weight, self.first_new_token)
        return rows

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each parameter that the checkpoint itself holds, adapters aside."""
        return ((name, self.state.read(name)) for name in list(self.state.tensors) if not is_adapter(name))

    def adapters(self) -> dict[str, Tensor]:
        """The adapters, `lora_a` [rank, in] and `lora_b` [out, rank] of each target, by name."""
        return {name: self.state.read(name) for name in self.state.tensors if is_adapter(name)}


def _decoder_config(content: Mapping[str, Any]) -> DecoderConfig:
    scaling = content.get("rope_scaling")
    return DecoderConfig(**{**content, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def _open_base(file: Path, init_from: str, verify: bool) -> WeightSource:
    try:
        return open_source(init_from, verify)
    except UserError as error:
        raise UserError(
            f"checkpoint {file} holds adapters, of another model: {error}; put that model back in its place"
        ) from error


class _MappedState:
    """Content of a checkpoint file, mapped into memory instead of read.

    Pages stay resident once they were read. The file is therefore mapped anew now and then, and a tensor that was
    handed out keeps its old mapping for as long as it lives.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.about: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._num_read = 0
        self._map()

    def read(self, name: str) -> Tensor:
        if self._num_read > _MAX_MAPPED:
            self._map()
        tensor = self.tensors[name]
        self._num_read += tensor.nbytes
        return tensor

    def _map(self) -> None:
        content = read_file(self.file)
        if "decoder" not in content:
            raise UserError(f"checkpoint {self.file} is not one of meap_lit: it has no decoder in it")
        self.about = content["decoder"]
        self.tensors = {
            key.removeprefix(_PREFIX): tensor
            for key, tensor in content["state_dict"].items()
            if key.startswith(_PREFIX)
        }
        self._num_read = 0


class _ShardedState:
    """A checkpoint in shards; `tensors` have no memory, one is read at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        state = read_trainer_state(folder)
        if "decoder" not in state:
            raise UserError(f"checkpoint {folder} is not one of meap_lit: it has no decoder in it")
        self.about: dict[str, Any] = state["decoder"]
        self.tensors = {
            name.removeprefix(_PREFIX): torch.empty(weight.size, dtype=weight.properties.dtype, device="meta")
            for name, weight in weights_in(read_index(folder)).items()
            if name.startswith(_PREFIX)
        }

    def read(self, name: str) -> Tensor:
        return read_weight(self.folder, _PREFIX + name)


def _refuse_format(file: Path) -> None:
    """Refuse a file of weights that is not a checkpoint of a run."""
    if file.suffix in PICKLED:
        raise UserError(pickle_refusal(file))
    if file.suffix == ".safetensors":
        raise UserError(f"{file} is a file of weights; name the folder that also holds its {CONFIG_FILE}")
