"""What `open_source` opens and refuses; adapters against the layers that trained them."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meap_lit.checkpoint.source import CheckpointSource, open_source, vocab_size_for
from meap_lit.errors import UserError
from meap_lit.hf.folder import HFFolder
from meap_lit.hf.weights import build_decoder, load_weights
from meap_lit.model import Decoder, DecoderConfig, RopeScaling
from meap_lit.model.lora import LoRA, add_lora
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.checkpoints import save, save_as_0_1
from tests.support.hf_models import SIZES, random_ids, save_variant
from tests.support.word_tokenizer import save_word_level

CONFIG = DecoderConfig(
    num_layers=1, num_heads=2, num_kv_heads=1, hidden_size=8, intermediate_size=8, vocab_size=64, max_seq_len=16
)


def save_checkpoint(
    file: Path,
    config: DecoderConfig = CONFIG,
    state: dict[str, Tensor] | None = None,
    as_0_1: bool = False,
    **about: Any,
) -> dict[str, Tensor]:
    """A checkpoint as Lightning and our modules write it, and its weights."""
    torch.manual_seed(0)
    state = Decoder(config).state_dict() if state is None else state
    write = save_as_0_1 if as_0_1 else save
    write(
        {
            "state_dict": {"decoder." + name: tensor for name, tensor in state.items()} | {"other": torch.ones(1)},
            "optimizer_states": [{"state": {"decoder.norm.weight": torch.ones(3)}, "param_groups": [{"params": []}]}],
            "decoder": {"config": dataclasses.asdict(config), "mask_token_id": 63, **about},
        },
        file,
    )
    return state


# ------------------------------------------------------------------------------------------ where weights lie


def test_a_run_that_went_back_to_an_earlier_step_goes_on_from_there(tmp_path: Path) -> None:
    for step, context in ((4, 104), (5, 105), (45, 145), (50, 150)):
        config = dataclasses.replace(CONFIG, max_seq_len=context)
        save_checkpoint(tmp_path / "checkpoints" / f"step={step}.ckpt", config)
    assert open_source(tmp_path).config.max_seq_len == 150
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step=45.ckpt")
    assert open_source(tmp_path).config.max_seq_len == 150, "saved later: a kill came before the link was moved"
    os.utime(tmp_path / "checkpoints" / "step=50.ckpt", (0, 0))
    assert open_source(tmp_path).config.max_seq_len == 145
    shutil.rmtree(tmp_path / "checkpoints" / "step=45.ckpt")
    assert open_source(tmp_path).config.max_seq_len == 150, "the link leads nowhere"


def test_a_run_its_file_and_the_folder_above_are_one(tmp_path: Path) -> None:
    for version in (0, 2, 10, 11):
        (tmp_path / f"version_{version}").mkdir()
    for version in (0, 2, 10):  # the run of version 11 has not got that far
        save_checkpoint(
            tmp_path / f"version_{version}" / "checkpoints" / "step=5.ckpt",
            dataclasses.replace(CONFIG, max_seq_len=100 + version),
        )
        (tmp_path / f"version_{version}" / "checkpoints" / "last.ckpt").symlink_to("step=5.ckpt")
    newest = tmp_path / "version_10"
    for path in (tmp_path, newest, newest / "checkpoints" / "last.ckpt", newest / "checkpoints" / "step=5.ckpt"):
        source = open_source(path)
        assert isinstance(source, CheckpointSource)
        assert source.config.max_seq_len == 110
        assert source.path == newest / "checkpoints" / "step=5.ckpt", "the link may turn to another while we read"
        assert source.tokenizer_folder is None
    (newest / "tokenizer").mkdir()
    (newest / "tokenizer" / "tokenizer.json").touch()
    assert open_source(str(tmp_path)).tokenizer_folder == newest / "tokenizer"
    assert isinstance(open_source(_hf(tmp_path / "hf")), HFFolder)


def _hf(folder: Path) -> Path:
    save_variant("llama", folder)
    return folder


@pytest.mark.parametrize("as_0_1", [False, True])
def test_weights_of_a_checkpoint(tmp_path: Path, as_0_1: bool) -> None:
    config = dataclasses.replace(CONFIG, rope_scaling=RopeScaling("yarn", 2.0), qk_norm=True, tie_embeddings=True)
    state = save_checkpoint(tmp_path / "a.ckpt", config, as_0_1=as_0_1)
    source = open_source(tmp_path / "a.ckpt")
    assert (source.config, source.model_type, source.dtype, source.generation) == (config, "qwen3", torch.float32, {})
    tensors = {name: source.read(name) for name in source.names()}
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    decoder, expected = build_decoder(config, source), Decoder(config)
    expected.load_state_dict(state)
    input_ids = random_ids(2, 16, 64)
    assert torch.equal(decoder(input_ids), expected(input_ids))


def test_what_a_checkpoint_remembers_of_its_origin(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "a.ckpt", model_type="mistral", dtype="bfloat16", init_from="gone", generation={"top_p": 0.9}
    )
    source = open_source(tmp_path / "a.ckpt")
    assert (source.model_type, source.dtype, source.generation) == ("mistral", torch.bfloat16, {"top_p": 0.9})
    assert source.read("norm.weight").dtype == torch.float32


def test_a_combination_that_no_family_has_opens_all_the_same(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.ckpt", dataclasses.replace(CONFIG, qkv_bias=True, qk_norm=True))
    source = open_source(tmp_path / "a.ckpt")
    assert source.model_type is None
    build_decoder(source.config, source)


# ------------------------------------------------------------------------------------------------- adapters


def _adapted(tmp_path: Path, dtype: torch.dtype, **about: Any) -> tuple[Decoder, Path]:
    """A decoder with random adapters on a grown model of transformers, and the checkpoint that would be written."""
    save_variant("qwen2", tmp_path / "base", dtype)
    base = open_source(tmp_path / "base")
    config = dataclasses.replace(base.config, vocab_size=128)
    decoder = build_decoder(config, base, dtype=torch.float32)
    load_weights(decoder, base, first_new_token=90)
    lora = LoRA(rank=2, alpha=3.0, targets=["q_proj", "down_proj"])
    add_lora(decoder, lora)
    torch.manual_seed(0)
    trained = {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.5)
    state = {name: parameter.detach() for name, parameter in trained.items()}
    assert len(state) == 2 * 2 * SIZES["num_hidden_layers"]
    save_checkpoint(
        tmp_path / "lora.ckpt",
        config,
        state,
        **{
            "lora": dataclasses.asdict(lora),
            "init_from": str(tmp_path / "base"),
            "model_type": "qwen2",
            "dtype": str(dtype).removeprefix("torch."),
            "first_new_token": 90,
            **about,
        },
    )
    return decoder, tmp_path / "lora.ckpt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_computes_what_the_adapted_one_did(tmp_path: Path, dtype: torch.dtype) -> None:
    adapted, file = _adapted(tmp_path, dtype)
    source = open_source(file)
    assert (source.config, source.model_type, source.dtype) == (adapted.config, "qwen2", dtype)
    merged = build_decoder(source.config, source, dtype=torch.float32)
    input_ids = random_ids(2, 20)
    with torch.no_grad():
        expected = adapted.logits(adapted(input_ids))
        torch.testing.assert_close(merged.logits(merged(input_ids)), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.lm_head.weight, adapted.lm_head.weight)
    assert not torch.equal(merged.layers[0].self_attn.q_proj.weight, adapted.layers[0].self_attn.q_proj.weight)


def test_merge_by_hand(tmp_path: Path) -> None:
    _, file = _adapted(tmp_path, torch.bfloat16)
    source, base = open_source(file), open_source(tmp_path / "base")
    assert isinstance(source, CheckpointSource)
    name, adapters = "layers.1.mlp.down_proj", source.adapters()
    lora_a, lora_b = adapters[f"{name}.lora_a"], adapters[f"{name}.lora_b"]
    assert (tuple(lora_a.shape), tuple(lora_b.shape)) == ((2, 48), (32, 2))
    merged = source.read(f"{name}.weight")
    assert merged.dtype == torch.float32
    expected = base.read(f"{name}.weight").double() + 1.5 * lora_b.double() @ lora_a.double()
    torch.testing.assert_close(merged.double(), expected, atol=1e-5, rtol=1e-5)
    untouched = source.read("layers.1.mlp.up_proj.weight")
    assert torch.equal(untouched, base.read("layers.1.mlp.up_proj.weight"))
    assert untouched.dtype == torch.bfloat16


def test_adapters_on_adapters(tmp_path: Path) -> None:
    """The base may itself be a checkpoint with adapters."""
    _, first = _adapted(tmp_path, torch.float32)
    source = open_source(first)
    name = "layers.0.self_attn.q_proj"
    state = {f"{name}.lora_a": torch.ones(1, 32), f"{name}.lora_b": torch.ones(32, 1)}
    about = {"lora": {"rank": 1, "alpha": 1.0, "targets": ["q_proj"]}, "init_from": str(first)}
    save_checkpoint(tmp_path / "second.ckpt", source.config, state, **about)
    torch.testing.assert_close(
        open_source(tmp_path / "second.ckpt").read(f"{name}.weight"), source.read(f"{name}.weight") + 1
    )


# ------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize(
    ("rows", "num_tokens", "has_mask", "expected"),
    [
        (96, 96, True, 96),
        (96, 90, False, 96),  # the mask takes a row in reserve
        (96, 95, False, 96),
        (96, 96, False, 128),  # and here it finds none
        (97, 97, False, 128),
        (96, 97, True, "has 96 vocabulary rows, too few for the 97 ids of tokenizer {}; name the tokenizer"),
        (96, 97, False, "has 96 vocabulary rows, too few for the 97 ids of tokenizer {}; name the tokenizer"),
    ],
)
def test_vocabulary_for_a_tokenizer(
    tmp_path: Path, rows: int, num_tokens: int, has_mask: bool, expected: int | str
) -> None:
    save_checkpoint(tmp_path / "a.ckpt", dataclasses.replace(CONFIG, vocab_size=rows))
    folder = save_word_level(tmp_path / "tokenizer", num_tokens, has_mask)
    source, tokenizer = open_source(tmp_path / "a.ckpt"), Tokenizer.load(str(folder))
    if isinstance(expected, int):
        assert vocab_size_for(source, tokenizer) == expected
        return
    with pytest.raises(UserError) as error:
        vocab_size_for(source, tokenizer)
    assert str(error.value).startswith(f"checkpoint {tmp_path / 'a.ckpt'} {expected.format(folder)}")


# ---------------------------------------------------------------------------------------------- what is wrong


def _folder(*files: str) -> Any:
    def make(path: Path) -> None:
        path.mkdir()
        for file in files:
            (path / file).touch()

    return make


def _saved(content: Any) -> Any:
    return lambda path: torch.save(content, path)


def _cut(path: Path) -> None:
    save_checkpoint(path, as_0_1=True)
    path.write_bytes(path.read_bytes()[:3_000])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("none", lambda path: None, "checkpoint {} does not exist"),
        (
            "empty",
            _folder(),
            "{} holds no checkpoint; name a Hugging Face folder (config.json, model.safetensors)",
        ),
        ("x", _folder("model.safetensors"), "{} has no config.json, which describes the model of its safetensors"),
        ("x", _folder("lit_model.pth"), "{} is a LitGPT checkpoint, which is not read; convert it to"),
        ("x", _folder("model_config.yaml"), "{} is a LitGPT checkpoint, which is not read; convert it to"),
        (
            "x",
            _folder("adapter_config.json", "adapter_model.safetensors"),
            "{} is a PEFT adapter, which is not read; merge it into its model first (merge_and_unload)",
        ),
        ("x", _folder("pytorch_model.bin"), "{}/pytorch_model.bin is a pickle, which can run code and is not read"),
        (
            "x.ckpt",
            _folder("metadata.json"),
            "{} holds no checkpoint; name a Hugging Face folder (config.json, model.safetensors), a run",
        ),
        (
            "a.bin",
            _saved({}),
            "{} is a pickle, which can run code and is not read; convert the model with",
        ),
        ("a.pt", _saved({}), "{} is a pickle, which can run code and is not read"),
        ("a.pth", _saved({}), "{} is a pickle, which can run code and is not read"),
        ("a.safetensors", _saved({}), "{} is a weight file; name the folder that also holds its config.json"),
        ("a.ckpt", _cut, "checkpoint file {} is cut short, or no checkpoint at all"),
        ("a.ckpt", lambda path: path.touch(), "checkpoint file {} is cut short, or no checkpoint at all"),
        (
            "a.ckpt",
            lambda path: path.write_text("some text"),
            "checkpoint file {} is cut short, or no checkpoint at all",
        ),
        ("a.ckpt", _saved({"x": Path()}), "checkpoint file {} is damaged or contains code, and is not read"),
        (
            "a.ckpt",
            lambda path: save_checkpoint(path, state={"layers.0.self_attn.q_proj.lora_a": torch.ones(1)}),
            "checkpoint {} does not describe its decoder as meap_lit does (KeyError('lora'))",
        ),
        ("a.ckpt", _saved([1]), "checkpoint file {} is damaged: it holds a list"),
        ("a.ckpt", _saved({"x": 1}), "{} is not a checkpoint: it has no state_dict in it"),
        ("a.ckpt", _saved({"state_dict": {}}), "checkpoint {} is not one of meap_lit: it has no decoder in it"),
        (
            "a.ckpt",
            _saved({"state_dict": {}, "decoder": {"config": {"num_wheels": 4}}}),
            "checkpoint {} does not describe its decoder as meap_lit does (",
        ),
        (
            "a.ckpt",
            lambda path: save_checkpoint(path, init_from="none", lora={"rank": 1, "alpha": 1.0, "targets": ["q_proj"]}),
            "checkpoint {} holds adapters, and their model cannot be opened: checkpoint none does not exist",
        ),
        ("a.ckpt", lambda path: save_checkpoint(path, dtype="int4"), "checkpoint {} does not describe its decoder as"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, name: str, make: Any, message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError) as error:
        open_source(tmp_path / name)
    assert str(error.value).startswith(message.format(tmp_path / name))
    assert "\n" not in str(error.value)
