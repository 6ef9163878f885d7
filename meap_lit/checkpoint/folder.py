"""Write a checkpoint as a folder by torch.distributed.checkpoint, and read it without running code in it.

The folder holds `.metadata` (the index), `__*.distcp` (weights and optimizer states, one file a rank that writes) and
`meta.pt` (the rest: counters, loops, callbacks, data). torch reads the index with pickle, and values that are not
tensors with `weights_only=False`. Here the index may name only the classes that an index consists of, and values are
read like the tensors. Every path that reads a checkpoint comes through this module: one process that needs the whole
or one weight, and the ranks of a run that resumes.
"""

import io
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from meap_lit.bounded_yaml import check_yaml
from meap_lit.checkpoint.checksums import INDEX, TRAINER_STATE, reading
from meap_lit.checkpoint.content import divide, load
from meap_lit.checkpoint.one_file import OneFile
from meap_lit.errors import UserError, shorten

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # Python 3.13
    "collections": ("OrderedDict",),
}

_KINDS = {
    "global_step": int,
    "saved": float,
    "recipe": str,
    **dict.fromkeys(("decoder", "hub", "services", "callbacks", "loops"), dict),
}
"""What the entries of a checkpoint are that are read before anything is restored from it."""

_WEIGHTS = "state_dict."
"""How the names of weights begin in the index."""

# torch warns whenever a single process reads or writes, as most commands do
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


# ------------------------------------------------------------------------------------------ writing


def write(
    checkpoint: dict[str, Any], folder: Path, *, rank: int | None = None, group: ProcessGroup | None = None
) -> None:
    """Write a checkpoint into a folder, without checksums.

    Args:
        checkpoint: As Lightning's Trainer gives it.
        folder: Created if it does not exist.
        rank: This rank, if all ranks of a run call this together and each writes its own part; None if one process
            writes the whole.
        group: Process group of the ranks that write; the default group if None.

    Raises:
        OSError: If one of the ranks cannot write a file.
        UserError: If the state of a callback could not be read back.
    """
    states, rest = divide(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(states, checkpoint_id=folder, process_group=group, no_dist=rank is None)
        if not rank:
            _refuse_unreadable(rest)
            torch.save(rest, folder / TRAINER_STATE)
    except (RuntimeError, CheckpointException) as error:
        problem = _file_error(error)
        if problem is None:
            raise
        raise problem from error


def _refuse_unreadable(rest: dict[str, Any]) -> None:
    """Raise `UserError` if a callback keeps what is never read from a checkpoint, such as a number of NumPy."""
    for name, state in rest.get("callbacks", {}).items():
        written = io.BytesIO()
        try:
            torch.save(state, written)
            written.seek(0)
            torch.load(written, weights_only=True)
        except Exception as error:  # also of a class that cannot be pickled
            shown = shorten(" ".join(repr(state).split()))
            raise UserError(
                f"the state of callback {name} ({shown}) cannot be read back without running code; let "
                f"its state_dict return numbers, texts, lists, dicts and tensors of torch"
            ) from error


def _file_error(error: BaseException) -> OSError | None:
    """Return what the operating system said about a file, which torch wraps in errors of its own or drops."""
    if isinstance(error, CheckpointException):
        causes = (_file_error(failure) for failure, _ in error.failures.values())
        return next((cause for cause in causes if cause is not None), None)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return OSError(cause.errno, cause.strerror or str(cause), cause.filename)
        cause = cause.__cause__ or cause.__context__
    if "inline_container" in str(error):  # torch's ZIP writer
        return OSError(None, "the disk is full, or cannot be written to")
    return None


# ------------------------------------------------------------------------------------------ reading


class StoredCheckpoint:
    """A checkpoint on disk. Opening it reads nothing; tensors are read whole, one by one, or into a rank's shards.

    What is damaged, has code in it, or was removed meanwhile is refused by `UserError`.

    Args:
        path: Its folder, or a file that an earlier version wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = OneFile(path) if path.is_file() else _Folder(path)

    @cached_property
    def trainer_state(self) -> dict[str, Any]:
        """All but the weights and the optimizers' states: counters, loops, callbacks, data.

        Raises:
            UserError: If it is damaged or has code in it.
        """
        with reading(self.path):
            state = self._reader.trainer_state()
        for name, kind in _KINDS.items():
            if name in state and not isinstance(state[name], kind):
                found = type(state[name]).__name__
                raise UserError(f"checkpoint {self.path} is damaged: its {name} is {found}, not {kind.__name__}")
        return state

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of its run; empty if an earlier version wrote the checkpoint, or it cannot be read.

        Raises:
            UserError: As for `trainer_state`.
        """
        text = self.trainer_state.get("recipe", "")
        try:
            check_yaml(text, "recipe")
            found = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def index(self) -> Metadata:
        """Names, shapes and dtypes of weights and optimizer states, and where they are.

        Raises:
            UserError: As for `read_index`.
        """
        with reading(self.path):
            return self._reader.read_metadata()

    @cached_property
    def weights(self) -> dict[str, TensorStorageMetadata]:
        """Shape and dtype of each weight, by its name in the module."""
        return {
            key.removeprefix(_WEIGHTS): about
            for key, about in self.index.state_dict_metadata.items()
            if key.startswith(_WEIGHTS) and isinstance(about, TensorStorageMetadata)
        }

    def read_all(self) -> dict[str, Any]:
        """Return the checkpoint as Lightning's Trainer takes it: `state_dict`, `optimizer_states` and the rest.

        The state of an optimizer stays keyed by the parameters' names. torch's optimizers take it so, as they match
        groups by position whatever the keys are, and a sharding strategy needs the names: from numbers it would guess
        them in the order of the module's parameters, which is not that of an optimizer with several groups.

        Raises:
            UserError: If it is damaged, has code in it, or was not written by Lightning.
        """
        flat = {key: _room(about) for key, about in self.index.state_dict_metadata.items()}
        self._load(flat, flatten=False)
        assert self.index.planner_data is not None
        nested: dict[Any, Any] = {}
        for key, value in flat.items():
            *parents, last = self.index.planner_data[key]
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        if "state_dict" not in nested:
            raise UserError(f"checkpoint {self.path} has no state_dict; only what Lightning's Trainer wrote is read")
        weights = nested.pop("state_dict")
        optimizers = [nested[key] for key in sorted(nested, key=lambda key: int(key.removeprefix("optimizer_")))]
        states = [_optimizer_state(state) for state in optimizers]
        return {**self.trainer_state, "state_dict": weights, "optimizer_states": states}

    def read_weight(self, name: str) -> Tensor:
        """Return one weight, by its name in the module.

        Raises:
            UserError: If it is damaged.
        """
        flat = {_WEIGHTS + name: _room(self.weights[name])}
        self._load(flat, flatten=False)
        return flat[_WEIGHTS + name]

    def load_into(self, states: dict[str, Any]) -> None:
        """Fill `states` in place, each rank its own shards; all ranks of a run call this together.

        Args:
            states: Nested state dicts of tensors and plain values, such as
                `{"state_dict": get_model_state_dict(module)}`.

        Raises:
            UserError: If the checkpoint is damaged, has code in it, or lacks what `states` names.
        """
        self._load(states, flatten=True)

    def refuse_code(self) -> None:
        """Read all of the checkpoint that may hold code, which is all but its tensors.

        Raises:
            UserError: If it is damaged or has code in it.
        """
        _ = self.trainer_state
        values = self.index.state_dict_metadata.items()
        self._load({name: None for name, about in values if isinstance(about, BytesStorageMetadata)}, flatten=False)

    def _load(self, states: dict[str, Any], *, flatten: bool) -> None:
        """Fill `states`: nested, by all ranks together, or flat, by this process alone."""
        planner = _Planner(flatten_state_dict=flatten)
        with reading(self.path):
            try:
                dcp.load(states, storage_reader=self._reader, planner=planner, no_dist=not flatten)
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                if isinstance(cause, UserError):
                    raise cause from error
                has_code = isinstance(cause, pickle.UnpicklingError)
                reason = "one is damaged or contains code" if has_code else " ".join(str(cause).split())
                raise UserError(f"the parts of checkpoint {self.path} cannot be read: {reason:.200}") from error


def _room(about: Any) -> Any:
    """Return an empty tensor on the CPU to read into; None for what is not a tensor."""
    if not isinstance(about, TensorStorageMetadata):
        return None
    return torch.empty(about.size, dtype=about.properties.dtype, device="cpu")  # a caller may build on the meta device


def _optimizer_state(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict of an optimizer, with its groups as a list and its keys as the groups name them."""
    groups = [group for _, group in sorted(nested["param_groups"].items())]
    keys = {str(key): key for group in groups for key in group["params"]}
    return {"state": {keys[key]: state for key, state in nested.get("state", {}).items()}, "param_groups": groups}


def read_index(folder: Path) -> Metadata:
    """Return the index of a checkpoint's folder.

    Raises:
        UserError: If it is damaged, has code in it, names files outside the folder, or announces more than they hold.
    """
    file = folder / INDEX
    try:
        with open(file, "rb") as opened:
            index = _IndexUnpickler(opened).load()
    except OSError as error:
        raise UserError(f"cannot read checkpoint file {file}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"checkpoint file {file} is damaged or contains code, and is not read ({error})") from error
    try:
        is_index = isinstance(index, Metadata) and _is_consistent(index)
    except (AttributeError, TypeError):  # a part of it has fewer fields than its class, or a field of another type
        is_index = False
    if not is_index:
        raise UserError(f"checkpoint file {file} is not the index of a checkpoint, or is damaged")
    names = {place.relative_path for place in index.storage_data.values()}
    outside = next((name for name in names if not _FILE_NAME.fullmatch(name)), None)
    if outside is not None:
        raise UserError(f"checkpoint file {file} names a file that is not one of its parts: {outside!r:.80}")
    announced = sum(
        about.size.numel() * about.properties.dtype.itemsize
        for about in index.state_dict_metadata.values()
        if isinstance(about, TensorStorageMetadata)
    )
    held = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
    if announced > held:
        raise UserError(
            f"checkpoint file {file} announces {announced} bytes of tensors, its parts hold {held}; it is damaged"
        )
    return index


_FILE_NAME = re.compile(r"__\d+_\d+\.distcp")
"""As torch names the files of a checkpoint; a path in its place would be read wherever it leads."""


def _is_consistent(index: Metadata) -> bool:
    """Return whether an index has the types that torch gives it; a damaged pickle may hold anything."""
    return (
        isinstance(index.planner_data, dict)
        and isinstance(index.state_dict_metadata, dict)
        and isinstance(index.storage_data, dict)
        and index.planner_data.keys() >= index.state_dict_metadata.keys()
        and all(isinstance(path, tuple) and path for path in index.planner_data.values())
        and all(
            isinstance(place.relative_path, str) and not place.transform_descriptors
            for place in index.storage_data.values()
        )
        and all(
            isinstance(about, BytesStorageMetadata)
            or (
                isinstance(about, TensorStorageMetadata)
                and isinstance(about.size, torch.Size)
                and isinstance(about.properties.dtype, torch.dtype)
                and isinstance(about.chunks, list)
                and _is_covered(about)
            )
            for about in index.state_dict_metadata.values()
        )
    )


def _is_covered(about: TensorStorageMetadata) -> bool:
    """Return whether the chunks of a tensor lie inside of it, and have as many elements: none would be left unread."""
    sizes = tuple(about.size)
    inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(sizes)
        and all(
            offset >= 0 and length >= 0 and offset + length <= size
            for offset, length, size in zip(chunk.offsets, chunk.sizes, sizes, strict=True)
        )
        for chunk in about.chunks
    )
    return inside and sum(math.prod(chunk.sizes) for chunk in about.chunks) == math.prod(sizes)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Folder(dcp.FileSystemReader):
    def trainer_state(self) -> dict[str, Any]:
        return load(Path(self.path) / TRAINER_STATE)

    @cached_property
    def _index(self) -> Metadata:
        return read_index(Path(self.path))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, weights_only=True)
        if not self.flatten_state_dict:
            self.original_state_dict[read_item.dest_index.fqn] = loaded
            return
        # torch puts the value in its place, and unpickles it without restriction: give it what was read with
        clean = io.BytesIO()
        torch.save(loaded, clean)
        clean.seek(0)
        super().load_bytes(read_item, clean)
