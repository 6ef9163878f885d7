"""A checkpoint in shards, as torch.distributed.checkpoint writes it, read without running its code.

torch reads the index with pickle and values that are not tensors with `weights_only=False`. Here the index may name
only the classes that an index consists of, and values are read like the tensors. Every path that reads shards comes
through this module: one process that wants the whole or one weight, and the ranks of a run that resumes.
"""

import io
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from meap_lit.checkpoint.checksums import SHARDS_INDEX, TRAINER_STATE
from meap_lit.errors import UserError

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


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Return all of a checkpoint but the weights and the optimizer's state: counters, loops, callbacks, data.

    Args:
        path: A folder of shards, or a checkpoint file, whose weights and states are mapped and not read.

    Raises:
        UserError: If it is damaged or has code in it.
    """
    file = path / TRAINER_STATE if path.is_dir() else path
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read checkpoint file {file}: {error.strerror}") from error
    except Exception as error:  # a damaged archive may fail in any way
        raise UserError(f"checkpoint file {file} is damaged, or has code in it and so is not read") from error
    if not isinstance(state, dict):
        raise UserError(f"checkpoint file {file} is damaged: it holds a {type(state).__name__}")
    return state


def read_index(folder: Path) -> Metadata:
    """Names, shapes and dtypes of what the shards hold, and where.

    Raises:
        UserError: If it is damaged, has code in it, names files outside the folder, or announces more than they hold.
    """
    file = folder / SHARDS_INDEX
    try:
        with open(file, "rb") as opened:
            index = _IndexUnpickler(opened).load()
    except OSError as error:
        raise UserError(f"cannot read checkpoint file {file}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise UserError(f"checkpoint file {file} is damaged, or has code in it and so is not read ({error})") from error
    try:
        is_index = isinstance(index, Metadata) and _is_consistent(index)
    except AttributeError:  # a part of it has fewer fields than its class
        is_index = False
    if not is_index:
        raise UserError(f"checkpoint file {file} is not an index of shards, or is damaged")
    outside = next(
        (place for place in index.storage_data.values() if not _SHARD_NAME.fullmatch(place.relative_path)), None
    )
    if outside is not None:
        raise UserError(
            f"checkpoint file {file} names a file that is not one of its shards: {outside.relative_path!r:.80}"
        )
    announced = sum(
        about.size.numel() * about.properties.dtype.itemsize
        for about in index.state_dict_metadata.values()
        if isinstance(about, TensorStorageMetadata)
    )
    held = sum(
        (folder / name).stat().st_size
        for name in {place.relative_path for place in index.storage_data.values()}
        if (folder / name).is_file()
    )
    if announced > held:
        raise UserError(
            f"checkpoint file {file} announces {announced} bytes of tensors, its shards hold {held}; it is damaged"
        )
    return index


_SHARD_NAME = re.compile(r"__\d+_\d+\.distcp")
"""As torch names the files of a checkpoint; a path in its place would be read wherever it leads."""


def _is_consistent(index: Metadata) -> bool:
    """Whether the parts of an index have the types that torch gives them; a damaged pickle may hold anything."""
    return (
        isinstance(index.planner_data, dict)
        and isinstance(index.state_dict_metadata, dict)
        and isinstance(index.storage_data, dict)
        and index.planner_data.keys() >= index.state_dict_metadata.keys()
        and all(isinstance(path, tuple) and path for path in index.planner_data.values())
        and all(
            isinstance(place, _StorageInfo) and isinstance(place.relative_path, str) and not place.transform_descriptors
            for place in index.storage_data.values()
        )
        and all(
            isinstance(about, BytesStorageMetadata)
            or (
                isinstance(about, TensorStorageMetadata)
                and isinstance(about.size, torch.Size)
                and isinstance(about.properties.dtype, torch.dtype)
                and isinstance(about.chunks, list)
            )
            for about in index.state_dict_metadata.values()
        )
    )


def read_shards(folder: Path) -> dict[str, Any]:
    """The whole checkpoint as Lightning keeps it in one file: `state_dict`, `optimizer_states` and the trainer's state.

    The state of an optimizer stays keyed by the parameters' names. torch's optimizers take it so, as they match groups
    by position whatever the keys are, and a sharding strategy needs the names: from numbers it would guess them in the
    order of the module's parameters, which is not that of an optimizer with several groups.

    Raises:
        UserError: If it is damaged, has code in it, or was not written by Lightning.
    """
    checkpoint = read_trainer_state(folder)
    index = read_index(folder)
    flat = {name: _room(about) for name, about in index.state_dict_metadata.items()}
    _read_into(flat, folder)
    nested: dict[Any, Any] = {}
    for name, value in flat.items():
        _put(nested, index.planner_data[name], value)
    if "state_dict" not in nested:
        raise UserError(f"checkpoint {folder} has no state_dict; only shards that Lightning's Trainer wrote are read")
    checkpoint["state_dict"] = nested.pop("state_dict")
    checkpoint["optimizer_states"] = [
        {"state": nested[key]["state"], "param_groups": list(nested[key]["param_groups"].values())}
        for key in sorted(nested, key=lambda key: int(key.removeprefix("optimizer_")))
    ]
    return checkpoint


def refuse_code(folder: Path) -> None:
    """Read all of a checkpoint that may hold code, which is all but its tensors.

    Raises:
        UserError: If it is damaged or has code in it.
    """
    read_trainer_state(folder)
    values = read_index(folder).state_dict_metadata.items()
    _read_into({name: None for name, about in values if isinstance(about, BytesStorageMetadata)}, folder)


def read_weight(folder: Path, name: str) -> Tensor:
    """One weight, by its name in the module.

    Raises:
        UserError: If it is damaged.
    """
    index = read_index(folder)
    assert index.planner_data is not None
    (key,) = (key for key, path in index.planner_data.items() if tuple(path) == ("state_dict", name))
    flat = {key: _room(index.state_dict_metadata[key])}
    _read_into(flat, folder)
    weight = flat[key]
    assert weight is not None
    return weight


def load_shards(states: dict[str, Any], folder: Path) -> None:
    """Fill `states` in place from the shards, each rank its own part; all ranks of a run call it together.

    Args:
        states: Nested state dicts of tensors and plain values, such as `{"state_dict": get_model_state_dict(module)}`.
        folder: The checkpoint.

    Raises:
        UserError: If it is damaged, has code in it, or lacks what `states` names.
    """
    try:
        dcp.load(states, storage_reader=_Reader(folder), planner=_Planner())
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, UserError):
            raise cause from error
        has_code = isinstance(cause, pickle.UnpicklingError)
        reason = "one is damaged, or has code in it" if has_code else " ".join(str(cause).split())
        raise UserError(f"the shards of checkpoint {folder} cannot be read: {reason:.200}") from error


def _read_into(flat: dict[str, Any], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is meant
            dcp.load(flat, storage_reader=_Reader(folder), planner=_Planner(flatten_state_dict=False), no_dist=True)
    except (dcp.api.CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the shards of checkpoint {folder} cannot be read: one is missing, damaged, or has code in it"
        ) from error


def weights_in(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of each weight in the shards, by its name in the module."""
    assert index.planner_data is not None
    paths = {name: index.planner_data[name] for name in index.state_dict_metadata}
    return {
        str(paths[name][1]): about
        for name, about in index.state_dict_metadata.items()
        if paths[name][0] == "state_dict" and isinstance(about, TensorStorageMetadata)
    }


def _room(about: Any) -> Tensor | None:
    """An empty tensor to read into; what is no tensor takes no room beforehand."""
    if not isinstance(about, TensorStorageMetadata):
        return None
    return torch.empty(about.size, dtype=about.properties.dtype)


def _put(nested: dict[Any, Any], path: Iterable[Any], value: Tensor | Any) -> None:
    *parents, last = path
    for key in parents:
        nested = nested.setdefault(key, {})
    nested[last] = value


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(self.folder)
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


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
