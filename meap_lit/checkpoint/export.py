"""Write a checkpoint as a Hugging Face folder, which transformers loads without code of ours."""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from meap_lit.checkpoint.card import model_card
from meap_lit.checkpoint.checksums import reading
from meap_lit.checkpoint.source import DTYPES, CheckpointSource, open_source, tokenizer_of
from meap_lit.data.prepare.step import Preparation
from meap_lit.data.read.find import RECORD_FILE
from meap_lit.errors import UserError
from meap_lit.files import parse_bytes, write_file
from meap_lit.hf.config import family, hf_name, write_config
from meap_lit.hf.folder import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, WEIGHTS_FILE
from meap_lit.hf.weights import WeightSource, check_weights
from meap_lit.hub import check_push, is_pinned, push
from meap_lit.model.config import DecoderConfig
from meap_lit.model.decoder import Decoder
from meap_lit.tokenizer.tokenizer import Tokenizer

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 splits text into words. For `model_type` qwen2, AutoTokenizer of transformers 5 takes this in place of what
tokenizer.json says (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`)."""


@dataclass(kw_only=True)
class Export(Preparation):
    """Write a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer, generation settings.

    Args:
        output: Folder to make.
        checkpoint: A run (runs/NAME or runs/NAME/version_0), a .ckpt file, a Hugging Face folder, or a Hub id (ORG/NAME
            or ORG/NAME@REVISION); adapters are merged.
        tokenizer: Folder or Hub id of the tokenizer of training, where the checkpoint's run keeps none.
        dtype: Dtype of the weights; if not given, that of the model it was fine-tuned from, and float32 after
            pretraining and for adapters alone.
        max_shard_size: Size of a weight file, such as 5GB; a whole file is in memory while it is written.
        adapter_only: Write only the LoRA adapters, in the format of PEFT.
        verify: Hash the checkpoint of a run and compare it with its checksums; false compares sizes only.
        push: Upload the folder to this repository (ORG/NAME) of the Hugging Face Hub, which is made if there is none.
            A README.md (model card) is added if the folder has none. Needs HF_TOKEN. A folder that exists is uploaded,
            as after a failure, unless the checkpoint is newer.
        private: Make that repository private.
    """

    checkpoint: str
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    max_shard_size: str = "5GB"
    adapter_only: bool = False
    verify: bool = field(default=True, compare=False)
    push: str | None = field(default=None, compare=False)
    private: bool = field(default=False, compare=False)

    def run(self) -> None:
        if self.push is None:
            if self.private:
                raise UserError("--private does nothing without --push ORG/NAME; leave it out")
            super().run()
            return
        check_push(self.push)
        output = Path(self.output)
        if output.exists():
            self.ensure()  # refuses what another export made
            self._refuse_older(output)
            print(f"{output} exists already and is pushed as it is")
        else:
            super().run()
        card = output / "README.md"
        if not card.exists():
            write_file(card, self._card(output, self.push))
        address = push(output, self.push, private=self.private, ignore=(RECORD_FILE,))
        print(f"pushed {output} to {address}")

    def _refuse_older(self, output: Path) -> None:
        """Refuse a folder that was exported before the checkpoint was written, as if the run went on since."""
        try:
            path = open_source(self.checkpoint, verify=False).path
        except UserError:  # a run that is gone has nothing newer
            return
        # the folder itself has the time at which a README.md was added
        with reading(path):
            is_older = (output / RECORD_FILE).stat().st_mtime < path.stat().st_mtime
        if is_older:
            raise UserError(
                f"{path} is newer than {output}, which was exported before; remove {output} to export again"
            )

    def _card(self, output: Path, repository: str) -> str:
        """Return the card of what was exported."""
        source = open_source(self.checkpoint, verify=False)
        if not self.adapter_only:  # an export may lack rows of the vocabulary that training had
            source = dataclasses.replace(source, config=open_source(output, verify=False).config)
        return model_card(source, repository, self.adapter_only)

    def make(self, folder: Path) -> str:
        max_bytes = parse_bytes(self.max_shard_size, "max_shard_size")
        source = open_source(self.checkpoint, self.verify)
        if self.adapter_only:
            return self._make_adapter(folder, source, DTYPES[self.dtype or "float32"])
        dtype = DTYPES[self.dtype] if self.dtype else source.dtype
        tokenizer = tokenizer_of(source, self.tokenizer)
        exported = _without_unused_mask(source, tokenizer)
        model_type = family(exported.config, exported.model_type)
        if model_type is None:
            raise UserError(
                f"{source.path} has decoder.qkv_bias and decoder.qk_norm, which no family of Hugging Face combines "
                f"(Qwen2 has the first, Qwen3 the second), so it cannot be exported"
            )
        files = _write_weights(folder, exported, dtype, max_bytes)
        _write_settings(folder, exported, model_type, dtype, tokenizer)
        note = _write_tokenizer(folder, exported, tokenizer, with_mask=exported is source)
        what = f"{exported.config.num_parameters():,} parameters, {model_type}"
        prompt = "--chat --prompt 'Name three rivers.'" if tokenizer.chat_template else "--prompt 'Once upon a time'"
        lines = [
            self._summary(folder, source, files, what, dtype),
            f"try: python -m meap_lit generate --checkpoint {shlex.quote(self.output)} {prompt}",
            *([note] if note else []),
        ]
        if model_type == "qwen2" and QWEN2_SPLIT not in _pre_tokenizer(tokenizer):
            lines.append(
                "load its tokenizer with PreTrainedTokenizerFast: AutoTokenizer would split text as Qwen2 does"
            )
        return "\n  ".join(lines)

    def _make_adapter(self, folder: Path, source: WeightSource, dtype: torch.dtype) -> str:
        if not isinstance(source, CheckpointSource) or source.lora is None:
            raise UserError(f"{source.path} holds no adapters; leave out --adapter_only")
        if source.base is None:
            raise UserError(
                f"{source.path} has adapters for a model that no other folder holds; leave out --adapter_only"
            )
        _refuse_other_training(source)
        _refuse_other_context(source.config, source.base.config)
        assert source.init_from is not None
        from_hub = is_pinned(source.init_from)
        adapters = {_peft_name(name): tensor.to(dtype) for name, tensor in source.adapters().items()}
        _save(adapters, folder / "adapter_model.safetensors")
        _write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": source.init_from.partition("@")[0] if from_hub else source.init_from,
                "revision": source.init_from.partition("@")[2] if from_hub else None,
                "r": source.lora.rank,
                "lora_alpha": source.lora.alpha,
                "target_modules": source.lora.targets,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "inference_mode": True,
            },
        )
        num_parameters = sum(tensor.numel() for tensor in adapters.values())
        what = f"{num_parameters:,} parameters in adapters"
        summary = self._summary(folder, source, ["adapter_model.safetensors"], what, dtype)
        if isinstance(source.base, CheckpointSource):
            summary += f"\n  export {source.init_from} too, because PEFT adds adapters to a Hugging Face folder"
        return summary

    def _summary(self, folder: Path, source: WeightSource, files: list[str], what: str, dtype: torch.dtype) -> str:
        size = sum((folder / file).stat().st_size for file in files)
        named = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        return "\n".join((
            f"exported {source.path} to {self.output}",
            f"  {what}, {str(dtype).removeprefix('torch.')}",
            f"  {named}, {f'{size / 1e9:.2f} GB' if size >= 1e8 else f'{size / 1e6:.2f} MB'}",
        ))  # fmt: skip


# ------------------------------------------------------------------------------------------------- weights


def _write_weights(folder: Path, source: WeightSource, dtype: torch.dtype, max_bytes: int) -> list[str]:
    """Write all parameters, one file at a time, and return the names of the files."""
    from huggingface_hub import split_state_dict_into_shards_factory  # takes half a second

    with torch.device("meta"):
        names = list(check_weights(Decoder(source.config), source))
    split = split_state_dict_into_shards_factory(
        {name: torch.Size(source.shape(name)).numel() * dtype.itemsize for name in names},
        get_storage_size=lambda size: size,
        filename_pattern=WEIGHTS_FILE.replace(".", "{suffix}."),
        max_shard_size=max_bytes,
    )
    for file, group in split.filename_to_tensors.items():
        _save({hf_name(name): _cast(source.read(name), dtype, name) for name in group}, folder / file)
    if split.is_sharded:
        weight_map = {hf_name(name): file for name, file in split.tensor_to_filename.items()}
        _write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": weight_map})
    return sorted(split.filename_to_tensors)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(cast).all():
        raise UserError(f"{name} has values outside the range of float16; write --dtype bfloat16")
    return cast


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    file.touch()
    mode = file.stat().st_mode  # the library makes files that only their owner can read
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot write {file.name}: {error}") from error
    file.chmod(mode)


# ---------------------------------------------------------------------------------------- settings and tokenizer


def _without_unused_mask(source: WeightSource, tokenizer: Tokenizer) -> WeightSource:
    """Return `source`, without the vocabulary rows of a mask token that was added but never used in training."""
    if not isinstance(source, CheckpointSource) or source.rows_without_mask is None:
        return source
    return source.without_mask() if tokenizer.mask_token_id == tokenizer.vocab_size - 1 else source


def _write_settings(
    folder: Path, source: WeightSource, model_type: str, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    """Write the configurations of the model and of its generation."""
    generation = _generation(source, tokenizer)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": generation["eos_token_id"]}
    _write_json(folder / CONFIG_FILE, write_config(source.config, model_type, dtype, source.positions) | special)
    _write_json(folder / GENERATION_FILE, generation)


def _write_tokenizer(folder: Path, source: WeightSource, tokenizer: Tokenizer, *, with_mask: bool) -> str | None:
    """Write the tokenizer, and return what a user should know of its mask token, if anything."""
    if not with_mask:
        tokenizer.save(folder, with_mask=False)
        return "without the mask token, since no input was masked in training"
    # no run of ours has used a mask token that was added in memory to the tokenizer of a Hugging Face folder
    is_ours = isinstance(source, CheckpointSource) or not tokenizer.mask_is_new
    if not is_ours or tokenizer.mask_token_id >= (source.config.vocab_size or 0):
        Tokenizer.copy_files(tokenizer.path, folder)  # the model has no row for the mask token
        return None
    tokenizer.save(folder)
    return (
        f"transformers takes {tokenizer.special_tokens['mask_token']} in a text for the mask token, unless its "
        f"tokenizer is called with split_special_tokens=True"
    )


def _generation(source: WeightSource, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the source's generation settings, with ids that have no token suppressed."""
    rows = source.config.vocab_size
    assert rows is not None
    known = {name: value for name, value in source.generation.items() if value is not None}
    settings = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **known}
    # with this mark transformers may replace the whole file by defaults taken from config.json
    settings.pop("_from_model_config", None)
    never = {*tokenizer.ids_without_token(rows), *(source.generation.get("suppress_tokens") or ())}
    settings["suppress_tokens"] = sorted(never | ({tokenizer.mask_token_id} & set(range(rows))))
    return settings


def _pre_tokenizer(tokenizer: Tokenizer) -> str:
    """Return the patterns by which a tokenizer splits text into words."""
    content = json.loads(tokenizer.copy_backend().to_str())["pre_tokenizer"] or {}
    patterns = [step.get("pattern", {}).get("Regex", "") for step in content.get("pretokenizers", [content])]
    return " ".join(patterns)


def _refuse_other_training(source: CheckpointSource) -> None:
    """Raise `UserError` if anything but the adapters was trained, since only they are written."""
    for name, stored in source.whole_weights():
        if not torch.equal(stored, source.read_base(name).to(stored.dtype)):
            raise UserError(
                f"{source.path} has trained all of {name}, which adapters do not hold; leave out --adapter_only"
            )


def _refuse_other_context(config: DecoderConfig, base: DecoderConfig) -> None:
    """Raise `UserError` if the run changed the rotary embedding, which a folder of adapters cannot say."""
    for name in ("rope_theta", "rope_scaling"):
        if getattr(config, name) != getattr(base, name):
            raise UserError(
                f"the run has {name} {getattr(config, name)} and the model of its adapters {getattr(base, name)} "
                f"(model.context), which adapters do not hold; leave out --adapter_only"
            )


def _peft_name(name: str) -> str:
    layer, part = name.rsplit(".", 1)
    peft_part = {"lora_a": "lora_A", "lora_b": "lora_B"}[part]
    return f"base_model.model.{hf_name(layer)}.{peft_part}.weight"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
