"""Folders that transformers wrote, read with the same logits; and damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from meap_lit.errors import UserError
from meap_lit.hf.folder import HFFolder
from meap_lit.hf.weights import build_decoder
from tests.support.hf_models import VARIANTS, edit_config, random_ids, save_variant


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Over the whole context, which for scaled rotary positions is four times that of pretraining."""
    model = save_variant(name, tmp_path)
    source = HFFolder.open(tmp_path)
    decoder = build_decoder(source.config, source)
    assert source.config.max_seq_len == (24 if "window" in name else 256 if name == "yarn whole context" else 64)
    input_ids = random_ids(2, source.config.max_seq_len)
    with torch.no_grad():
        expected = model(input_ids).logits
        torch.testing.assert_close(decoder.logits(decoder(input_ids)), expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.3


def test_shards_read_as_one_file(tmp_path: Path) -> None:
    save_variant("qwen2", tmp_path / "one", torch.bfloat16)
    save_variant("qwen2", tmp_path / "shards", torch.bfloat16, max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    one, shards = HFFolder.open(tmp_path / "one"), HFFolder.open(tmp_path / "shards")
    assert (one.config, one.dtype) == (shards.config, shards.dtype)
    assert set(one.names()) == set(shards.names())
    for name in one.names():
        assert one.shape(name) == shards.shape(name) == tuple(one.read(name).shape)
        assert one.read(name).dtype == torch.bfloat16
        assert torch.equal(one.read(name), shards.read(name))


def test_description(tmp_path: Path) -> None:
    save_variant("qwen3 tied", tmp_path, torch.float16)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7}')
    source = HFFolder.open(tmp_path)
    assert (source.path, source.model_type, source.dtype) == (tmp_path, "qwen3", torch.float16)
    assert (source.tokenizer_folder, source.generation) == (tmp_path, {"temperature": 0.7})
    assert "lm_head.weight" not in source.names()


@pytest.mark.parametrize(
    ("stated", "generation", "expected"),
    [
        ([5, 7], None, [5, 7]),
        (5, None, 5),
        ([5, 7], {"temperature": 0.7}, [5, 7]),
        ([5, 7], {"eos_token_id": None}, [5, 7]),
        ([5, 7], {"eos_token_id": 9}, 9),
        ([5, 7], {"eos_token_id": [7, 9]}, [7, 9]),
    ],
)
def test_stop_ids_that_only_the_configuration_names(stated, generation, expected, tmp_path: Path) -> None:
    save_variant("llama", tmp_path)
    edit_config(tmp_path, eos_token_id=stated)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert HFFolder.open(tmp_path).generation == {**(generation or {}), "eos_token_id": expected}
    if generation is None:  # what transformers takes without that file
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
        assert theirs.eos_token_id == expected


@pytest.mark.parametrize(
    ("name", "changes", "context"),
    [
        (
            "mistral window",
            {"max_position_embeddings": 64},
            "24 tokens (its sliding window; max_position_embeddings is 64)",
        ),
        ("qwen2 window", {}, "24 tokens (its sliding window; max_position_embeddings is 64)"),
        ("qwen2 window", {"layer_types": ["full_attention"] * 2}, "64 tokens"),
        ("qwen2 window", {"max_position_embeddings": 20}, "20 tokens"),
        ("llama", {}, "64 tokens"),
    ],
)
def test_context_in_words(name: str, changes: dict, context: str, tmp_path: Path) -> None:
    save_variant(name, tmp_path)
    edit_config(tmp_path, **changes)
    assert HFFolder.open(tmp_path).context == context


def test_vocabulary_is_what_is_there(tmp_path: Path) -> None:
    save_variant("llama", tmp_path)
    edit_config(tmp_path, vocab_size=90)
    assert HFFolder.open(tmp_path).config.vocab_size == 96


def test_inverse_frequencies_of_old_files_are_no_weights(tmp_path: Path) -> None:
    save_variant("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors"
    )
    source = HFFolder.open(tmp_path)
    assert len(source.names()) == len(tensors)
    build_decoder(source.config, source)


# ---------------------------------------------------------------------------------------------- what is wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` and `shards` with the same tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    save_variant("llama", folder / "one")
    save_variant("llama", folder / "shards", max_shard_size="20KB")
    return folder


def cut(file: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return change


def write(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


def remove(pattern: str, *instead: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()
        for name in instead:
            (folder / name).write_text("x")

    return change


def store(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """Replace tensors, `__` for a dot; None takes one out."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({name: tensor for name, tensor in content.items() if tensor is not None}, file)

    return change


def index(**changes: str) -> Callable[[Path], None]:
    """Change the place of tensors, `__` for a dot."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        content = json.loads(file.read_text())
        content["weight_map"] |= {name.replace("__", "."): place for name, place in changes.items()}
        file.write_text(json.dumps(content))

    return change


def load(folder: Path) -> None:
    source = HFFolder.open(folder)
    build_decoder(source.config, source)


SHARD = "model-00002-of-00005.safetensors"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "one",
            write("generation_config.json", '{"eos_token_id": [1, "2"]}'),
            '/generation_config.json: eos_token_id must hold token ids, got [1, "2"]',
        ),
        (
            "one",
            write("generation_config.json", '{"suppress_tokens": 2}'),
            "/generation_config.json: suppress_tokens must hold token ids, got 2",
        ),
        ("one", write("config.json", "{"), "/config.json: not valid JSON ("),
        ("one", write("config.json", "[]"), "/config.json: not a JSON object but list"),
        ("one", cut("model.safetensors", 60_000), "/model.safetensors is damaged or cut short (incomplete metadata"),
        ("one", cut("model.safetensors", 100), "/model.safetensors is damaged or cut short (invalid header length"),
        ("one", cut("model.safetensors", 0), "/model.safetensors is damaged or cut short (header too small"),
        ("shards", cut(SHARD, 5_000), f"/{SHARD} is damaged or cut short (incomplete metadata"),
        ("shards", remove(SHARD), f"/{SHARD} is missing; model.safetensors.index.json lists it"),
        (
            "shards",
            index(lm_head__weight="../x"),
            "/model.safetensors.index.json names a file '../x' that is not a .safetensors of its own",
        ),
        ("shards", index(extra=SHARD), f"/{SHARD} has no tensor extra, which model.safetensors.index.json says"),
        ("shards", write("model.safetensors.index.json", "{}"), "/model.safetensors.index.json has no weight_map"),
        ("one", remove("*.safetensors"), " has no weights: neither model.safetensors nor model.safetensors.index.json"),
        (
            "one",
            remove("*.safetensors", "pytorch_model.bin"),
            "/pytorch_model.bin is a pickle, which can run code and is not read; convert the model with transformers: "
            "save_pretrained(folder, safe_serialization=True)",
        ),
        ("one", remove("*.safetensors", "model.pt"), "/model.pt is a pickle, which can run code"),
        ("one", remove("*.safetensors", "lit_model.pth"), " is a LitGPT checkpoint, which is not read; convert it to"),
        ("one", remove("*.safetensors", "adapter_config.json"), " is a PEFT adapter, which is not read; merge it"),
        ("one", store(model__embed_tokens__weight=None), " has no tensor model.embed_tokens.weight; it holds no lang"),
        ("one", store(model__norm__weight=None), " has no tensor norm.weight; the model and its file do not fit"),
        ("one", store(surplus=torch.ones(1)), "/model.safetensors has an unknown tensor surplus; the model and its"),
        (
            "one",
            store(model__norm__weight=torch.ones(31)),
            "/model.safetensors: tensor norm.weight has shape [31], the model needs [32]",
        ),
        (
            "one",
            store(model__norm__weight=torch.ones(32, dtype=torch.int8)),
            "/model.safetensors: tensor model.norm.weight is stored as I8, only F32, BF16, F16 are read; use the",
        ),
    ],
)
def test_damage_is_said_in_one_line(saved: Path, kind: str, change, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / kind, folder)
    change(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(saved: Path, name: str, monkeypatch) -> None:
    def refuse(path: Path, *arguments: str, **options: str):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *arguments, **options)

    open_file = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError) as error:
        load(saved / "one")
    assert str(error.value) == f"cannot read {saved / 'one' / name}: Permission denied"
