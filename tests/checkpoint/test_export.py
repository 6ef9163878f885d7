"""Exported folders, as transformers reads them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from meap_lit.checkpoint.export import Export
from meap_lit.checkpoint.source import open_source
from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText
from meap_lit.errors import UserError
from meap_lit.hf.weights import build_decoder
from meap_lit.model import Decoder, DecoderConfig, RopeScaling
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.support.checkpoints import read, save
from tests.support.hf_models import VARIANTS, random_ids, save_variant
from tests.support.word_tokenizer import save_word_level

CONFIG = DecoderConfig(
    num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=32, intermediate_size=48, vocab_size=128, max_seq_len=64
)
MASK = 2  # of tests.support.word_tokenizer, whose ids 100 to 127 are padding here
PADDING = list(range(100, 128))


def toy(**changes: Any) -> DecoderConfig:
    return dataclasses.replace(CONFIG, **changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return str(save_word_level(tmp_path_factory.mktemp("tokenizer"), 100, True, chat_template=template))


def save_run(folder: Path, config: DecoderConfig, **about: Any) -> Decoder:
    """A run's folder with one checkpoint of a random model."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    save(
        {"state_dict": state, "decoder": {"config": dataclasses.asdict(config), "mask_token_id": MASK, **about}},
        folder / "checkpoints" / "step=1.ckpt",
    )
    return decoder.eval()


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def greedy(decoder: Decoder, ids: list[int], num_tokens: int, never: list[int]) -> list[int]:
    """The most likely continuation, by a plain loop without a cache."""
    for _ in range(num_tokens):
        with torch.no_grad():
            scores = decoder.logits(decoder(torch.tensor([ids])))[0, -1]
        scores[never] = -torch.inf
        ids = [*ids, int(scores.argmax())]
    return ids


# --------------------------------------------------------------------------------------------- our own models

SCALING = RopeScaling("yarn", 4.0, original_max_seq_len=16, beta_fast=8.0)
OURS = {
    "llama": (toy(), "llama"),
    "llama tied, scaled": (toy(tie_embeddings=True, rope_scaling=RopeScaling("linear", 2.0)), "llama"),
    "llama 3": (toy(rope_theta=500.0, rope_scaling=RopeScaling("llama3", 4.0, original_max_seq_len=16)), "llama"),
    "yarn": (toy(rope_scaling=SCALING), "llama"),
    "yarn factor": (toy(rope_scaling=dataclasses.replace(SCALING, attention_factor=1.5)), "llama"),
    "width that heads do not divide": (toy(hidden_size=36, num_heads=8, head_dim=6), "mistral"),
    "qwen2": (toy(qkv_bias=True, rope_theta=1e6), "qwen2"),
    "qwen2 head": (toy(qkv_bias=True, head_dim=12), "qwen2"),
    "qwen3 of the quickstart": (
        toy(num_kv_heads=4, hidden_size=64, intermediate_size=128, head_dim=32, qk_norm=True),
        "qwen3",
    ),
    "qwen3 tied": (toy(qk_norm=True, tie_embeddings=True), "qwen3"),
}


@pytest.mark.parametrize("name", OURS)
def test_transformers_computes_and_generates_the_same(
    name: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model_type = OURS[name]
    decoder = save_run(tmp_path / "run", config)
    Export(checkpoint=str(tmp_path / "run"), tokenizer=tokenizer, output=str(tmp_path / "out")).run()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert (model.config.model_type, model.dtype) == (model_type, torch.float32)
    input_ids = random_ids(2, 64, 128)
    with torch.no_grad():
        expected = decoder.logits(decoder(input_ids))
        torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-4, rtol=1e-4)

    again = open_source(tmp_path / "out")
    assert (again.config, again.model_type) == (config, model_type)
    state = decoder.state_dict()
    assert all(torch.equal(again.read(name), state[name]) for name in again.names())

    # for qwen2, AutoTokenizer would put Qwen2's way of splitting in place of the tokenizer's own; the export says so
    kind = transformers.PreTrainedTokenizerFast if model_type == "qwen2" else transformers.AutoTokenizer
    assert ("with PreTrainedTokenizerFast" in capsys.readouterr().out) == (model_type == "qwen2")
    theirs = kind.from_pretrained(tmp_path / "out")
    prompt = theirs("w7 w8 w9", add_special_tokens=False).input_ids
    assert prompt == [7, 8, 9]
    with torch.no_grad():  # so that the mask token or padding would come next, were they not suppressed
        decoder.lm_head.weight[[MASK, 110]] *= 20
        model.lm_head.weight[[MASK, 110]] *= 20
    assert {MASK, 110} & set(greedy(decoder, prompt, 12, []))
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    assert generated.tolist() == greedy(decoder, prompt, 12, [MASK, *PADDING])


def test_tokenizer_and_settings(tokenizer: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", CONFIG, generation={"temperature": 0.6, "eos_token_id": [1, 5], "suppress_tokens": [9]})
    Export(checkpoint=str(tmp_path / "run"), tokenizer=tokenizer, output=str(tmp_path / "out")).run()
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {
        "bos_token_id": 0,
        "eos_token_id": [1, 5],
        "temperature": 0.6,
        "suppress_tokens": [MASK, 9, *PADDING],
    }
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (0, [1, 5], 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id) == (0, 1, MASK)
    assert theirs.apply_chat_template([{"role": "user", "content": "w3"}], tokenize=False) == "w3 "
    assert Tokenizer.load(str(tmp_path / "out")).fingerprint == Tokenizer.load(tokenizer).fingerprint


def test_a_mask_token_that_was_new_goes_with_the_model(tmp_path: Path) -> None:
    folder = save_word_level(tmp_path / "run" / "tokenizer", 100, has_mask=False)
    save_run(tmp_path / "run", CONFIG)
    Export(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out")).run()
    assert open_source(tmp_path / "run").tokenizer_folder == folder
    exported = Tokenizer.load(str(tmp_path / "out"))
    assert (exported.mask_token_id, exported.mask_is_new) == (100, False)


def test_the_tokenizer_of_qwen2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "run", toy(qkv_bias=True, vocab_size=320))
    characters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id for id, token in enumerate(["<|endoftext|>", *characters, "Ġa"])}
    theirs = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[("Ġ", "a")])
    theirs.save_pretrained(tmp_path / "run" / "tokenizer")
    Export(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out")).run()
    assert "PreTrainedTokenizerFast" not in capsys.readouterr().out
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "it's a 12th\n\n e\u0301"
    assert again(text).input_ids == theirs(text).input_ids == Tokenizer.load(str(tmp_path / "out")).encode(text)
    assert (again.mask_token_id, again.eos_token_id) == (len(theirs), 0)


# ------------------------------------------------------------------------------ a mask token that was or was not used


@pytest.fixture(scope="module")
def without_mask(prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 320 tokens without a mask among them, and a dataset made with it."""
    folder = tmp_path_factory.mktemp("without_mask")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend.train(
        [str(file) for file in prepared.texts.iterdir()],
        tokenizers.trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(
        folder / "tokenizer"
    )
    options = {"tokenizer": str(folder / "tokenizer"), "output": str(folder / "dataset"), "num_workers": 1}
    PrepareText(input=[str(prepared.texts)], val_share=0.1, **options).run()
    return folder


DECODER = (
    "decoder: {num_layers: 2, num_heads: 2, num_kv_heads: 1, hidden_size: 32, intermediate_size: 64, max_seq_len: 64}"
)


def train(toy_recipe: Path, folder: Path, name: str, *arguments: str, init_from: Path | None = None) -> Path:
    """A run of two steps with the tokenizer and dataset of `folder`, and its export."""
    recipe = toy_recipe.with_name(f"{name}.yaml")
    text = toy_recipe.read_text()
    assert DECODER in text
    recipe.write_text(text if init_from is None else text.replace(DECODER, f"init_from: {init_from}"))
    options = ["--data.datasets", str(folder / "dataset"), "--data.tokenizer", str(folder / "tokenizer")]
    options += ["--budget.max_steps", "2", "--trainer.logger.name", name, *arguments]
    assert main(["fit", "--config", str(recipe), *options]) == 0
    run, output = recipe.parent / "runs" / name, recipe.parent / f"{name}-out"
    assert main(["export", "--checkpoint", str(run), "--output", str(output)]) == 0
    return output


def test_a_run_without_masks_is_exported_without_the_mask_token(
    toy_recipe: Path, without_mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train(toy_recipe, without_mask, "plain", "--model.mask_ratio", "0")
    assert "without the mask token, since no input was masked in training\n" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    original = transformers.AutoTokenizer.from_pretrained(without_mask / "tokenizer")
    assert (len(theirs), theirs.mask_token) == (320, None)
    assert theirs("the old [MASK]").input_ids == original("the old [MASK]").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == 320
    assert model.generation_config.suppress_tokens == []
    run = open_source(tmp_path / "runs" / "plain")
    assert run.config.vocab_size == 384  # in training it has the shape of the masked run that it is compared with
    decoder, input_ids = build_decoder(run.config, run), random_ids(1, 16, 320)
    with torch.no_grad():
        expected = decoder.logits(decoder(input_ids))[..., :320]
        torch.testing.assert_close(model(input_ids).logits, expected, atol=1e-5, rtol=1e-4)
    again = Tokenizer.load(str(output))
    assert again.document_fingerprint == Tokenizer.load(str(without_mask / "tokenizer")).document_fingerprint

    # a second stage without masks: what was not used stays unused, and the model that came out goes in
    second = train(toy_recipe, without_mask, "second", "--model.mask_ratio", "0", init_from=tmp_path / "runs" / "plain")
    third = train(toy_recipe, without_mask, "third", "--model.mask_ratio", "0", init_from=output)
    for folder in (second, third):
        assert open_source(folder).config.vocab_size == 320
        assert Tokenizer.load(str(folder)).mask_is_new


def test_a_mask_that_was_used_is_exported(
    toy_recipe: Path, without_mask: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ramp = [
        "--model.mask_ratio",
        "meap_lit.masking.Linear",
        "--model.mask_ratio.start",
        "0",
        "--model.mask_ratio.end",
        "0.5",
    ]
    output = train(toy_recipe, without_mask, "masked", *ramp)
    assert "transformers takes [MASK] in a text for the mask token, unless" in capsys.readouterr().out
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    bare = transformers.AutoTokenizer.from_pretrained(without_mask / "tokenizer")("the old [MASK]").input_ids
    assert (len(theirs), theirs.mask_token_id) == (321, 320)
    assert theirs("the old [MASK]").input_ids[-1] == 320
    assert theirs("the old [MASK]", split_special_tokens=True).input_ids == bare
    assert open_source(output).config.vocab_size == 384
    # a stage without masks does not make it unused
    second = train(
        toy_recipe, without_mask, "second", "--model.mask_ratio", "0", init_from=tmp_path / "runs" / "masked"
    )
    assert transformers.AutoTokenizer.from_pretrained(second).mask_token_id == 320
    # nor does a resume that masks nothing any more
    checkpoint = tmp_path / "runs" / "masked" / "version_0" / "checkpoints" / "step=2.ckpt"
    more = ["--ckpt_path", str(checkpoint), "--budget.max_steps", "3", "--model.mask_ratio", "0"]
    resumed = train(toy_recipe, without_mask, "resumed", *more)
    assert transformers.AutoTokenizer.from_pretrained(resumed).mask_token_id == 320


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("max_shard_size", ["5GB", "12KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2 tied", "qwen3"])
def test_import_and_export_keep_every_byte(name: str, dtype: torch.dtype, max_shard_size: str, tmp_path: Path) -> None:
    save_variant(name, tmp_path / "in", dtype)
    save_word_level(tmp_path / "in", 80, has_mask=True)
    Export(checkpoint=str(tmp_path / "in"), output=str(tmp_path / "out"), max_shard_size=max_shard_size).run()
    before, after = load_all(tmp_path / "in"), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor_name, tensor in before.items():
        assert after[tensor_name].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), after[tensor_name].view(torch.uint8))
    assert open_source(tmp_path / "out").config == open_source(tmp_path / "in").config
    assert ("model.safetensors" in os.listdir(tmp_path / "out")) == (max_shard_size == "5GB")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    assert type(model).__name__ == f"{VARIANTS[name][0]}ForCausalLM"


def test_shards(tokenizer: str, tmp_path: Path) -> None:
    decoder = save_run(tmp_path / "run", CONFIG)
    Export(
        checkpoint=str(tmp_path / "run"), tokenizer=tokenizer, output=str(tmp_path / "out"), max_shard_size="20KB"
    ).run()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in decoder.parameters())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    assert len(files) > 3
    for file in files:
        with safe_open(file, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}
            names = list(content.keys())
            sizes = [content.get_tensor(name).nbytes for name in names]
        assert sum(sizes) <= 20_000
        assert all(index["weight_map"][name] == file.name for name in names)
        assert file.stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode


@pytest.mark.parametrize(("asked", "kept", "expected"), [(None, "bfloat16", "bfloat16"), ("float16", None, "float16")])
def test_dtype(asked: Any, kept: str | None, expected: str, tokenizer: str, tmp_path: Path) -> None:
    decoder = save_run(tmp_path / "run", CONFIG, dtype=kept)
    Export(checkpoint=str(tmp_path / "run"), tokenizer=tokenizer, output=str(tmp_path / "out"), dtype=asked).run()
    dtype = getattr(torch, expected)
    assert open_source(tmp_path / "out").dtype == dtype
    assert torch.equal(load_all(tmp_path / "out")["lm_head.weight"], decoder.lm_head.weight.to(dtype))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_a_model_that_never_met_the_mask_keeps_its_tokenizer(tmp_path: Path) -> None:
    save_variant("llama", tmp_path / "in")
    save_word_level(tmp_path / "in", 96, has_mask=False)
    Export(checkpoint=str(tmp_path / "in"), output=str(tmp_path / "out")).run()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "in" / name).read_text()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["suppress_tokens"] == []


def test_a_folder_with_rows_to_spare_keeps_its_tokenizer_too(tmp_path: Path) -> None:
    """As that of Qwen: a mask token would have a row, but no run has trained it."""
    save_variant("llama", tmp_path / "in")
    save_word_level(tmp_path / "in", 80, has_mask=False)
    Export(checkpoint=str(tmp_path / "in"), output=str(tmp_path / "out")).run()
    assert Tokenizer.load(str(tmp_path / "out")).mask_is_new
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "in" / name).read_text()


# --------------------------------------------------------------------------------------------------- adapters


def save_adapters(folder: Path, dtype: torch.dtype, **whole: Tensor) -> dict[str, Tensor]:
    """A checkpoint with random adapters on a model of transformers, and the adapters."""
    save_variant("llama", folder / "base", dtype)
    save_word_level(folder / "base", 96, has_mask=True)
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for layer, width in (("self_attn.v_proj", 16), ("mlp.gate_proj", 48)):
        for number in range(2):
            shapes = {"lora_a": (2, 32), "lora_b": (width, 2)}
            adapters |= {
                f"layers.{number}.{layer}.{part}": torch.randn(shape, generator=generator)
                for part, shape in shapes.items()
            }
    shutil.rmtree(folder / "lora.ckpt", ignore_errors=True)
    save(
        {
            "state_dict": {f"decoder.{name}": tensor for name, tensor in {**adapters, **whole}.items()},
            "decoder": {
                "config": dataclasses.asdict(open_source(folder / "base").config),
                "mask_token_id": MASK,
                "init_from": str(folder / "base"),
                "dtype": str(dtype).removeprefix("torch."),
                "lora": {"rank": 2, "alpha": 8.0, "targets": ["v_proj", "gate_proj"]},
            },
        },
        folder / "lora.ckpt",
    )
    return adapters


def test_adapters_are_merged(tmp_path: Path) -> None:
    adapters = save_adapters(tmp_path, torch.bfloat16)
    options = {"checkpoint": str(tmp_path / "lora.ckpt"), "tokenizer": str(tmp_path / "base")}
    Export(**options, output=str(tmp_path / "out")).run()
    before, after = load_all(tmp_path / "base"), load_all(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {f"layers.{number}.{layer}" for number in (0, 1) for layer in ("self_attn.v_proj", "mlp.gate_proj")}
    assert changed == {f"model.{layer}.weight" for layer in layers}
    for layer in layers:
        delta = 4 * adapters[f"{layer}.lora_b"] @ adapters[f"{layer}.lora_a"]
        expected = before[f"model.{layer}.weight"].float() + delta
        torch.testing.assert_close(after[f"model.{layer}.weight"], expected.bfloat16())


def test_adapters_alone_in_the_format_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = save_adapters(tmp_path, torch.float32)
    Export(checkpoint=str(tmp_path / "lora.ckpt"), output=str(tmp_path / "out"), adapter_only=True).run()
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in adapters.items():
        peft_name = name.replace("lora_a", "lora_A").replace("lora_b", "lora_B")
        assert torch.equal(written.pop(f"base_model.model.model.{peft_name}.weight"), tensor)
    assert not written
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 8.0)
    assert config["target_modules"] == ["v_proj", "gate_proj"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert not (tmp_path / "out" / "config.json").exists()
    assert "512 parameters in adapters, float32" in capsys.readouterr().out


def test_adapters_of_a_run_with_another_context_are_not_written_alone(tmp_path: Path) -> None:
    save_adapters(tmp_path, torch.float32)
    config = dataclasses.asdict(open_source(tmp_path / "base").config)
    stored = read(tmp_path / "lora.ckpt")
    shutil.rmtree(tmp_path / "lora.ckpt")
    about = {**stored["decoder"], "config": {**config, "rope_theta": 640_000.0}}
    save({"state_dict": stored["state_dict"], "decoder": about}, tmp_path / "lora.ckpt")
    with pytest.raises(
        UserError, match=r"the run has rope_theta 640000.0 and the model of its adapters \d+.*; leave out"
    ):
        Export(checkpoint=str(tmp_path / "lora.ckpt"), output=str(tmp_path / "out"), adapter_only=True).run()


def test_plain_adapters_on_a_plain_run_lose_both_rows_of_the_mask(
    toy_recipe: Path, without_mask: Path, tmp_path: Path
) -> None:
    """320 tokens, so that the mask token takes a block of rows of its own."""
    train(toy_recipe, without_mask, "plain", "--model.mask_ratio", "0")
    options = ["--model.mask_ratio", "0", "--model.lora.rank", "2"]
    output = train(toy_recipe, without_mask, "adapters", *options, init_from=tmp_path / "runs" / "plain")
    assert open_source(output).config.vocab_size == 320


# ---------------------------------------------------------------------------------------------- command, errors


def test_command(tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoder = save_run(tmp_path / "run", CONFIG)
    output = tmp_path / "out of it"
    arguments = ["export", "--checkpoint", str(tmp_path / "run"), "--tokenizer", tokenizer, "--output", str(output)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"exported {tmp_path / 'run' / 'checkpoints' / 'step=1.ckpt'} to {output}",
        f"  {sum(p.numel() for p in decoder.parameters()):,} parameters, llama, float32",
        f"  model.safetensors, {(output / 'model.safetensors').stat().st_size / 1e6:.2f} MB",
        f"  try: python -m meap_lit generate --checkpoint '{output}' --chat --prompt 'Name three rivers.'",
        "  transformers takes [MASK] in a text for the mask token, unless its tokenizer is called with "
        "split_special_tokens=True",
    ]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: output {output} exists already; remove it or name another --output\n"
    shutil.rmtree(output)
    assert main([*arguments[:-4], *arguments[-2:]]) == 2
    assert "has no tokenizer; name that of its training with --tokenizer" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            toy(qkv_bias=True, qk_norm=True),
            {},
            "{run}/checkpoints/step=1.ckpt has decoder.qkv_bias and decoder.qk_norm, which no family of",
        ),
        (CONFIG, {"max_shard_size": "5"}, "max_shard_size must be a size in"),
        (CONFIG, {"adapter_only": True}, "{run}/checkpoints/step=1.ckpt holds no adapters; leave out --adapter_only"),
        (
            toy(vocab_size=64),
            {},
            "checkpoint {run}/checkpoints/step=1.ckpt has 64 vocabulary rows, too few for the 100",
        ),
    ],
)
def test_wrong_input(config: DecoderConfig, options: dict, message: str, tokenizer: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", config)
    options = {"checkpoint": str(tmp_path / "run"), "tokenizer": tokenizer, "output": str(tmp_path / "out"), **options}
    with pytest.raises(UserError) as error:
        Export(**options).run()
    assert str(error.value).startswith(message.format(run=tmp_path / "run"))
    assert not list(tmp_path.glob("out*"))


def test_float16_that_overflows(tokenizer: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", CONFIG)
    file = tmp_path / "run" / "checkpoints" / "step=1.ckpt"
    content = read(file)
    content["state_dict"]["decoder.norm.weight"][3] = 70_000
    shutil.rmtree(file)
    save(content, file)
    options = {"checkpoint": str(file), "tokenizer": tokenizer, "output": str(tmp_path / "out"), "dtype": "float16"}
    with pytest.raises(UserError, match=r"^norm.weight has values outside the range of float16; write --dtype"):
        Export(**options).run()


def test_a_model_with_a_tensor_too_many(tmp_path: Path) -> None:
    save_variant("llama", tmp_path / "in")
    save_word_level(tmp_path / "in", 96, has_mask=True)
    file = tmp_path / "in" / "model.safetensors"
    save_file({**load_file(file), "surplus": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"model.safetensors has an unknown tensor surplus; the model and its file"):
        Export(checkpoint=str(tmp_path / "in"), output=str(tmp_path / "out")).run()


def test_whole_weights_do_not_fit_into_adapters(tmp_path: Path) -> None:
    save_adapters(tmp_path, torch.bfloat16)
    frozen = open_source(tmp_path / "base").read("embed_tokens.weight").float()
    save_adapters(tmp_path, torch.bfloat16, **{"embed_tokens.weight": frozen})
    options = {"checkpoint": str(tmp_path / "lora.ckpt"), "adapter_only": True}
    Export(**options, output=str(tmp_path / "frozen")).run()
    frozen[5, 5] += 1e-6
    save_adapters(tmp_path, torch.bfloat16, **{"embed_tokens.weight": frozen})
    with pytest.raises(UserError, match=r"lora.ckpt has trained all of embed_tokens.weight, which adapters"):
        Export(**options, output=str(tmp_path / "trained")).run()


def test_adapters_of_a_model_that_is_nowhere_else(tmp_path: Path) -> None:
    save_run(tmp_path / "run", CONFIG, lora={"rank": 1, "alpha": 1.0, "targets": ["q_proj"]})
    with pytest.raises(
        UserError, match=r"step=1.ckpt has adapters for a model that no other folder holds; leave out --adapter_only$"
    ):
        Export(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "out"), adapter_only=True).run()


def test_exported_folder_is_the_model_it_came_from(tokenizer: str, tmp_path: Path) -> None:
    """Pretrain, export, open: the same scores, with the tokenizer at hand."""
    decoder = save_run(tmp_path / "run", CONFIG)
    Export(checkpoint=str(tmp_path / "run"), tokenizer=tokenizer, output=str(tmp_path / "out")).run()
    source = open_source(tmp_path / "out")
    assert source.tokenizer_folder == tmp_path / "out"
    again = build_decoder(source.config, source)
    input_ids = random_ids(1, 64, 128)
    assert torch.equal(again.logits(again(input_ids)), decoder.logits(decoder(input_ids)))
