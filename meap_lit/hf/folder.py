"""Read a Hugging Face folder: config.json beside one weight file (safetensors), or several with an index."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meap_lit.errors import UserError
from meap_lit.files import read_json
from meap_lit.hf.config import POSITION_KEYS, hf_name, our_name, read_config
from meap_lit.hf.weights import EMBEDDING, WeightSource

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
PICKLED = (".bin", ".pt", ".pth")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class _Entry:
    """A tensor, as the header of its file describes it."""

    file: Path
    hf_name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class HFFolder(WeightSource):
    """A folder as transformers' `save_pretrained` writes it."""

    entries: Mapping[str, _Entry] = field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "HFFolder":
        """Read config.json and the headers of all weight files, but no weights.

        Raises:
            UserError: If something is missing or damaged, or the decoder cannot be this model.
        """
        content = read_json(folder / CONFIG_FILE)
        config, model_type = read_config(content, str(folder / CONFIG_FILE))
        entries = _entries(folder)
        if EMBEDDING not in entries:
            raise UserError(f"{folder} has no tensor {hf_name(EMBEDDING)}; it holds no language model")
        for entry in entries.values():
            if entry.dtype not in _DTYPES:
                raise UserError(
                    f"{entry.file}: tensor {entry.hf_name} is stored as {entry.dtype}, only {', '.join(_DTYPES)} are "
                    f"read; use the model as it was before quantization"
                )
        return cls(
            path=folder,
            config=dataclasses.replace(config, vocab_size=entries[EMBEDDING].shape[0]),
            model_type=model_type,
            dtype=_DTYPES[entries[EMBEDDING].dtype],
            tokenizer_folder=folder if (folder / "tokenizer.json").is_file() else None,
            generation=_read_generation(folder, content),
            positions={key: content[key] for key in POSITION_KEYS if key in content},
            entries=entries,
        )

    def names(self) -> list[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        # the file is opened for this tensor alone: pages that were read stay resident while it is mapped
        with _open_safetensors(entry.file) as file:
            return file.get_tensor(entry.hf_name)

    def where(self, name: str) -> Path:
        return self.entries[name].file if name in self.entries else self.path


def _entries(folder: Path) -> dict[str, _Entry]:
    """Return all tensors of the folder, by our name."""
    if (folder / WEIGHTS_FILE).is_file():  # transformers prefers it too
        found = _file_entries(folder / WEIGHTS_FILE)
    elif (folder / INDEX_FILE).is_file():
        found = _indexed_entries(folder)
    else:
        missing = f"{folder} has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE} exists"
        raise UserError(foreign_format(folder) or missing)
    named = ((our_name(entry.hf_name), entry) for entry in found)
    return {name: entry for name, entry in named if name is not None}


def _file_entries(file: Path) -> list[_Entry]:
    with _open_safetensors(file) as content:
        slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118, not a dict
        return [_Entry(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def _indexed_entries(folder: Path) -> list[_Entry]:
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map, which names the file of each tensor")
    found: dict[str, _Entry] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{index} names a file {name!r:.80} that is not a .safetensors of its own folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {INDEX_FILE} lists it, so copy or download the folder anew")
        found |= {entry.hf_name: entry for entry in _file_entries(folder / name)}
    absent = min((name for name in weight_map if name not in found), default=None)
    if absent is not None:
        raise UserError(f"{folder / weight_map[absent]} has no tensor {absent}, which {INDEX_FILE} says it has")
    return [found[name] for name in weight_map]


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    try:
        file.open("rb").close()  # the library reports any file that it cannot open as missing
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    try:
        with safe_open(str(file), framework="pt") as content:
            yield content
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(f"{file} is damaged or cut short ({reason}); copy or download it anew") from error


def foreign_format(folder: Path) -> str | None:
    """Return why a folder is refused whose weights are in a known format that is not read, else None."""
    if (folder / "lit_model.pth").is_file() or (folder / "model_config.yaml").is_file():
        return f"{folder} is a LitGPT checkpoint, which is not read; convert it to Hugging Face's format first"
    if (folder / "adapter_config.json").is_file():
        return f"{folder} is a PEFT adapter, which is not read; merge it into its model first (merge_and_unload)"
    pickled = sorted(file for file in folder.iterdir() if file.suffix in PICKLED)
    return pickle_refusal(pickled[0]) if pickled else None


def pickle_refusal(file: Path) -> str:
    """Return why a file of pickled weights is not read, and what to do."""
    return (
        f"{file} is a pickle, which can run code and is not read; convert the model with transformers: "
        f"save_pretrained(folder, safe_serialization=True)"
    )


def _read_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of generation_config.json, and the ids that only config.json names.

    Transformers takes these ids from config.json if generation_config.json does not exist.
    """
    file = folder / GENERATION_FILE
    content = read_json(file) if file.is_file() else {}
    for key in ("eos_token_id", "suppress_tokens"):
        where = file
        if content.get(key) is None and config.get(key) is not None:
            where, content[key] = folder / CONFIG_FILE, config[key]
        ids = content.get(key) or []
        is_single = key == "eos_token_id" and isinstance(ids, int)
        if not is_single and not (isinstance(ids, list) and all(isinstance(token_id, int) for token_id in ids)):
            raise UserError(f"{where}: {key} must hold token ids, got {json.dumps(ids)}")
    return content
