"""Files of others: what is pickled in them is not run, their names do not lead elsewhere, damage is named, bombs end.

| file                                        | read by                                       | attacks                |
|---------------------------------------------|-----------------------------------------------|------------------------|
| checkpoint in one file (version 0.1)        | every command of `COMMANDS`                   | code, flip             |
| .metadata, .distcp, meta.pt, checksums.json | the same; a resume with any strategy          | code, flip, path, bomb |
| index.json, local and remote                | fit, validate, evaluate, prepare merge        | code, flip, path       |
| manifest.json, samples.npz                  | the same                                      | code, flip, path, bomb |
| model.safetensors.index.json, config.json   | fit (init_from), export, generate, evaluate   | path, bomb             |
| tokenizer.json, chat templates              | every command that reads text                 | code, bomb             |
| answers and settings of evaluations         | evaluate                                      | damage                 |
| preparation.json, a link beside the output  | fit, prepare                                  | damage, path           |

Every attack ends in one line with status 2, or changes nothing.
"""

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, TensorStorageMetadata

from meap_lit.checkpoint.checksums import CHECKSUMS_FILE, check, checksums, seal
from meap_lit.checkpoint.content import load
from meap_lit.checkpoint.folder import read_index
from meap_lit.cli import main
from meap_lit.data.prepare.text import PrepareText
from meap_lit.data.store.manifest import Manifest, load_samples
from meap_lit.data.stream.chat import ChatSamples
from meap_lit.data.stream.text import TokenBlocks
from meap_lit.errors import UserError
from meap_lit.evaluation.runner import Records
from meap_lit.files import new_folder, partial_path, write_file
from meap_lit.hf.folder import HFFolder
from meap_lit.tokenizer.chat_template import ChatTemplate
from meap_lit.tokenizer.tokenizer import Tokenizer
from tests.conftest import TOY_RECIPE
from tests.support.checkpoints import read, save_as_0_1, seal_as_0_1
from tests.support.object_store import one_store, store  # noqa: F401  fixtures
from tests.support.older_dataset import make_older


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def flips(content, count, seed=0):
    """Copies of some bytes with one bit turned over, at places drawn by `seed`."""
    draw = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        yield bytes(damaged)


def refuse(capsys, *words):
    """The one line of a command that refuses its input; notes come before it."""
    assert main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------------------------------------- checkpoints

SHARDED = ["--config", "recipes/strategy/fsdp.yaml", "--trainer.devices", "1"]


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory):
    """A recipe, and two runs of it after two steps: on one device, and with FSDP."""
    folder = tmp_path_factory.mktemp("security")
    recipe = folder / "toy.yaml"
    recipe.write_text(TOY_RECIPE.format(dataset=prepared.dataset, tokenizer=prepared.tokenizer, runs=folder / "runs"))
    for options in ([], SHARDED):
        assert main(["fit", "--config", str(recipe), *options, "--budget.max_steps", "2"]) == 0
    return folder


@pytest.fixture
def file(runs, tmp_path):
    """A checkpoint in one file, as version 0.1 wrote it, that a test may spoil."""
    save_as_0_1(read(runs / "runs/toy/version_0/checkpoints/step=2.ckpt"), tmp_path / "one.ckpt")
    return tmp_path / "one.ckpt"


@pytest.fixture
def folder(runs, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(runs / "runs/toy/version_1/checkpoints/step=2.ckpt", tmp_path / "step=2.ckpt"))


def command(name, checkpoint, runs, prepared):
    """Words of a command that reads a checkpoint."""
    recipe = ["--config", runs / "toy.yaml", *(SHARDED if checkpoint.is_dir() else [])]
    aside = checkpoint.parent
    return {
        "fit": ["fit", *recipe, "--ckpt_path", checkpoint, "--trainer.logger.save_dir", aside],
        "validate": ["validate", *recipe, "--ckpt_path", checkpoint, "--trainer.logger.save_dir", aside],
        "init_from": [
            *("fit", *recipe, "--model.decoder", "null", "--model.init_from", checkpoint),
            *("--trainer.logger.save_dir", aside),
        ],
        "export": ["export", "--checkpoint", checkpoint, "--output", aside / "out", "--tokenizer", prepared.tokenizer],
        "generate": ["generate", "--checkpoint", checkpoint, "--prompt", "a", "--tokenizer", prepared.tokenizer],
        "evaluate": [
            *("evaluate", "--config", "recipes/eval/small/perplexity.yaml", "--checkpoint", checkpoint),
            *("--task.dataset", prepared.dataset, "--task.seq_len", "32", "--task.num_sequences", "2"),
            *("--tokenizer", prepared.tokenizer, "--output", aside / "out"),
        ],
        "inspect": ["checkpoint", "inspect", "--checkpoint", checkpoint],
        "verify": ["checkpoint", "verify", "--checkpoint", checkpoint],
        "consolidate": ["checkpoint", "consolidate", "--checkpoint", checkpoint, "--output", aside / "whole.ckpt"],
    }[name]


COMMANDS = ("fit", "validate", "init_from", "export", "generate", "evaluate", "inspect", "consolidate")


@pytest.mark.parametrize(("name", "is_sealed"), [(COMMANDS[0], True), *((name, False) for name in COMMANDS)])
def test_code_in_a_file_is_not_run(runs, prepared, file, capsys, name, is_sealed):
    content = torch.load(file, weights_only=True)
    torch.save(content | {"decoder": Harm(file.parent / "trace")}, file)
    if is_sealed:  # who writes code into a checkpoint writes its checksums too
        seal_as_0_1(file)
    line = refuse(capsys, *command(name, file, runs, prepared))
    assert line == f"error: checkpoint file {file} is damaged or contains code, and is not read"
    assert not (file.parent / "trace").exists()


def put_into_index(folder, harm):
    (folder / ".metadata").write_bytes(pickle.dumps(harm))


def put_into_trainer_state(folder, harm):
    torch.save({"decoder": harm}, folder / "meta.pt")


def put_into_value(folder, harm):
    """In the place of a plain value of the optimizer, which torch reads with `weights_only=False`."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    plain = {name for name, about in index.state_dict_metadata.items() if isinstance(about, BytesStorageMetadata)}
    (place, *_) = (place for key, place in index.storage_data.items() if key.fqn in plain)
    payload = io.BytesIO()
    torch.save(harm, payload)
    with open(folder / place.relative_path, "ab") as opened:
        place.offset, place.length = opened.tell(), payload.tell()
        opened.write(payload.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("put", [put_into_index, put_into_trainer_state, put_into_value])
@pytest.mark.parametrize("name", COMMANDS)
def test_code_in_a_folder_is_not_run(runs, prepared, folder, capsys, name, put):
    (folder / CHECKSUMS_FILE).unlink()
    put(folder, Harm(folder.parent / "trace"))
    words = command(name, folder, runs, prepared)
    if put is put_into_value and name not in ("fit", "validate", "consolidate"):
        main([str(word) for word in words])  # reads weights only
    else:
        assert "contains code" in refuse(capsys, *words)
    assert not (folder.parent / "trace").exists()


@pytest.mark.parametrize("overlay", [["--trainer.strategy", "auto"], []])
@pytest.mark.parametrize("put", [put_into_index, put_into_trainer_state, put_into_value])
def test_the_strategy_itself_runs_no_code(runs, prepared, folder, capsys, put, overlay):
    put(folder, Harm(folder.parent / "trace"))
    seal(folder, checksums(folder))
    with mock.patch("meap_lit.callbacks.checkpoint.VerifyCheckpoint.setup"):
        assert "contains code" in refuse(capsys, *command("fit", folder, runs, prepared), *overlay)
    assert not (folder.parent / "trace").exists()


def test_code_is_not_run_even_if_a_recipe_asks_for_it(runs, prepared, file, capsys):
    line = refuse(capsys, *command("fit", file, runs, prepared), "--weights_only", "false")
    assert line == "error: weights_only false would run code from a checkpoint, which is never done; leave it out"


def test_a_checkpoint_at_an_address_is_refused(runs, capsys):
    words = ["fit", "--config", runs / "toy.yaml", "--ckpt_path", "s3://bucket/step=2.ckpt"]
    assert "is an address, which cannot be verified; copy the checkpoint here first" in refuse(capsys, *words)


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_flipped_byte(runs, prepared, file, folder, capsys, name, form):
    checkpoint = file if form == "file" else folder
    spoilt = next(checkpoint.glob("*.distcp")) if form == "folder" else checkpoint
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1
    spoilt.write_bytes(content)
    line = refuse(capsys, *command(name, checkpoint, runs, prepared))
    assert line.startswith(f"error: checkpoint file {spoilt} is damaged: its content is not what was written; ")


def test_a_flip_anywhere_in_a_file_is_named(file):
    content = file.read_bytes()
    for damaged in flips(content, 150):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"^checkpoint file {file} .*"):
            check(file)


def test_a_flip_anywhere_in_a_folder_is_named(folder):
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for damaged in flips(content, 40):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"^checkpoint file {folder}/.*") as error:
                check(folder)
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    check(folder)


def test_what_carries_no_checksums_is_said_to_be_unverified(runs, prepared, folder, capsys):
    (folder / CHECKSUMS_FILE).unlink()
    assert main([str(word) for word in command("inspect", folder, runs, prepared)]) == 0
    note = f"note: checkpoint {folder} has no checksums, so its content is not verified\n"
    assert capsys.readouterr().err == note


def flip_a_moment(folder):
    """Flip a bit of the optimizer's largest tensor, which every command can read."""
    places = pickle.loads((folder / ".metadata").read_bytes()).storage_data
    place = max((place for key, place in places.items() if key.fqn.startswith("optimizer")), key=lambda one: one.length)
    file = folder / place.relative_path
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 1
    file.write_bytes(content)
    return file


def without_hashes(name):
    """Options of a command that leave hashes out; training ends soon."""
    if name not in ("fit", "validate", "init_from"):
        return ["--verify", "false"]
    return ["--checkpoint.verify", "false", *([] if name == "validate" else ["--budget.max_steps", "3"])]


@pytest.mark.parametrize("name", COMMANDS)
def test_hashes_are_left_out_when_told_so(runs, prepared, folder, capsys, name):
    spoilt = flip_a_moment(folder)
    content = spoilt.read_bytes()
    words = [*command(name, folder, runs, prepared), *without_hashes(name)]
    spoilt.write_bytes(content[:-1])  # sizes are always compared
    assert "bytes where" in refuse(capsys, *words)
    spoilt.write_bytes(content)
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def adapters(runs):
    """A run of adapters, on a checkpoint in a folder `base`."""
    base = shutil.copytree(runs / "runs/toy/version_1/checkpoints/step=2.ckpt", runs / "base" / "step=2.ckpt")
    lora = ["--model.lora.rank", "2", "--model.lora.alpha", "4", "--model.lora.targets", "[q_proj]"]
    words = ["--model.decoder", "null", "--model.init_from", str(base), *lora, "--trainer.logger.name", "adapters"]
    assert main(["fit", "--config", str(runs / "toy.yaml"), *words, "--budget.max_steps", "2"]) == 0
    return runs / "runs" / "adapters" / "version_0"


@pytest.mark.parametrize("name", ["fit", "validate", "export", "generate", "evaluate"])
def test_the_model_of_adapters_is_verified_with_them(runs, prepared, adapters, tmp_path, capsys, name):
    checkpoint = Path(shutil.copytree(adapters / "checkpoints" / "step=2.ckpt", tmp_path / "step=2.ckpt"))
    words = command(name, checkpoint, runs, prepared)
    words = [adapters / "config.yaml" if word == runs / "toy.yaml" else word for word in words]
    words += ["--budget.max_steps", "3"] if name == "fit" else []
    (part,) = (runs / "base" / "step=2.ckpt").glob("*.distcp")
    good = part.read_bytes()
    try:
        flip_a_moment(part.parent)
        spoilt = part.read_bytes()
        assert f"checkpoint file {part} is damaged: its content is not what was written" in refuse(capsys, *words)
        part.write_bytes(spoilt[:-1])
        assert f"{part} is damaged: it has" in refuse(capsys, *words, *without_hashes(name))
        part.write_bytes(spoilt)
        assert main([str(word) for word in [*words, *without_hashes(name)]]) == 0
    finally:
        part.write_bytes(good)


def test_report_and_plan_compare_sizes_only(runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs / "runs/toy/version_0", tmp_path / "run"))
    checkpoint = run / "checkpoints" / "step=2.ckpt"
    spoilt = flip_a_moment(checkpoint)
    plan = ["plan", "--config", runs / "toy.yaml", "--model.decoder", "null", "--model.init_from", checkpoint]
    plan += ["--devices", "1"]
    plain = ["--model.mask_ratio", "0", "--trainer.logger.save_dir", str(tmp_path / "plain"), "--budget.max_steps", "2"]
    assert main(["fit", "--config", str(runs / "toy.yaml"), *plain]) == 0
    report = ["report", "--runs", str(run), str(tmp_path / "plain"), "--output", str(tmp_path / "report")]
    with mock.patch("meap_lit.checkpoint.checksums._hash", side_effect=AssertionError):
        assert main(report) == 0
        assert main([str(word) for word in plan]) == 0
    spoilt.write_bytes(spoilt.read_bytes()[:-1])
    assert "bytes where" in refuse(capsys, *plan)


def test_checksums_of_files_elsewhere_are_refused(folder):
    content = json.loads((folder / CHECKSUMS_FILE).read_text())
    content["files"]["../secret"] = content["files"]["meta.pt"]
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"checksums.json is damaged: it lists '../secret' outside the folder; name"):
        check(folder)


def test_an_index_stays_in_its_folder_and_within_what_there_is(folder):
    file = folder / ".metadata"
    good = file.read_bytes()
    index = pickle.loads(good)
    for place in index.storage_data.values():
        place.relative_path = "../../secret"
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"names a file that is not one of its parts: '../../secret'$"):
        read_index(folder)
    index = pickle.loads(good)
    (weight, *_) = (about for about in index.state_dict_metadata.values() if isinstance(about, TensorStorageMetadata))
    weight.size = torch.Size([1 << 40])
    weight.chunks = [ChunkStorageMetadata(torch.Size([0]), weight.size)]
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"announces \d+ bytes of tensors, its parts hold \d+"):
        read_index(folder)


@pytest.mark.parametrize("chunks", [[], [([0], [1])], [([0], [1 << 40]), ([0], [-(1 << 40)])], [([1], None)]])
def test_an_index_whose_chunks_are_not_the_whole_tensor_is_damaged(folder, chunks):
    """What no chunk fills would be whatever the memory held."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    (weight, *_) = (about for about in index.state_dict_metadata.values() if isinstance(about, TensorStorageMetadata))
    weight.size = torch.Size([4])
    weight.chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes or weight.size)) for offsets, sizes in chunks
    ]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"\.metadata is not the index of a checkpoint, or is damaged$"):
        read_index(folder)


def test_a_compressed_state_is_not_read(folder):
    file = folder / "meta.pt"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=rf"^checkpoint file {file} is damaged or contains code, and is not read$"):
        load(file)


@pytest.mark.parametrize("part", ["size", "properties", "chunks"])
def test_an_index_without_a_part_is_named(folder, part):
    index = pickle.loads((folder / ".metadata").read_bytes())
    (weight, *_) = (about for about in index.state_dict_metadata.values() if isinstance(about, TensorStorageMetadata))
    delattr(weight, part)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UserError, match=r"\.metadata is not the index of a checkpoint, or is damaged$"):
        read_index(folder)


# ------------------------------------------------------------------------------------------------- datasets


@pytest.fixture(params=["text", "chat"])
def dataset(request, prepared, chat, tmp_path):
    """A dataset of each kind that a test may spoil, and its kind."""
    source = {"text": prepared.dataset, "chat": chat}[request.param]
    return Path(shutil.copytree(source, tmp_path / "dataset")), request.param


def open_dataset(location, kind, storage=None):
    """All that a run does with a dataset before it reads a chunk."""
    options = {} if storage is None else {"storage": storage}
    manifest = Manifest.load(str(location), kind=kind, **options)
    for name, split in manifest.splits.items():
        if kind == "text":
            TokenBlocks(f"{location}/{name}", 32, **options)
        else:
            load_samples(str(location), name, files=split.files, **options)
            ChatSamples(f"{location}/{name}", 320, **options)


def test_a_flip_anywhere_in_what_describes_a_dataset_is_named(dataset):
    folder, kind = dataset
    open_dataset(folder, kind)
    tables = ["train/samples.npz", "val/samples.npz"] if kind == "chat" else []
    for name in ("manifest.json", "train/index.json", "val/index.json", *tables):
        file = folder / name
        content = file.read_bytes()
        for damaged in flips(content, 100):
            file.write_bytes(damaged)
            with pytest.raises(UserError) as error:
                open_dataset(folder, kind)
            assert str(folder) in str(error.value)
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    open_dataset(folder, kind)


def test_a_flip_in_an_older_dataset_ends_in_no_traceback(dataset):
    folder, kind = dataset
    make_older(folder)
    for name in ("manifest.json", "train/index.json", "val/index.json"):
        file, num_named = folder / name, 0
        content = file.read_bytes()
        for damaged in flips(content, 100):
            file.write_bytes(damaged)
            try:
                open_dataset(folder, kind)
            except UserError:
                num_named += 1
        assert num_named > 25, "without hashes many flips break nothing but the syntax"
        file.write_bytes(content)


def spoil_index(folder, **changes):
    """Change the first chunk (`chunk_*`) and the configuration of an index, and make its manifest agree."""
    make_older(folder)
    file = folder / "train" / "index.json"
    index = json.loads(file.read_text())
    chunk = {name: changes.pop(name) for name in list(changes) if name in index["chunks"][0]}
    index["chunks"][0] |= chunk
    index["config"] |= changes
    file.write_text(json.dumps(index))


HOSTILE_INDEXES = [
    ({"filename": "../../../x.bin"}, "names a chunk '../../../x.bin', which is not a plain file name"),
    ({"filename": "/etc/passwd"}, "names a chunk '/etc/passwd', which is not a plain file name"),
    ({"filename": "index.json"}, "names a chunk 'index.json', which is not a plain file name"),
    ({"filename": ".lock"}, "names a chunk '.lock', which is not a plain file name"),
    ({"data_format": ["pickle"]}, "stores samples as 'pickle'; only tensors are read"),
    ({"data_format": ["graph:pickle"]}, "stores samples as 'graph:pickle'; only tensors are read"),
    ({"compression": "zstd"}, "is damaged, or not made by meap_lit prepare"),
    ({"encryption": {"algorithm": "fernet"}}, "is damaged, or not made by meap_lit prepare"),
    ({"item_loader": "ParquetLoader"}, "is damaged, or not made by meap_lit prepare"),
    ({"data_spec": '[1, {"type": "os.system", "context": "[]", "children_spec": []}]'}, "is damaged"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE_INDEXES)
def test_an_index_leads_nowhere_else(prepared, tmp_path, changes, message):
    folder = Path(shutil.copytree(prepared.dataset, tmp_path / "dataset"))
    spoil_index(folder, **dict(changes))
    for action in (lambda: Manifest.load(str(folder)), lambda: TokenBlocks(f"{folder}/train", 32)):
        with pytest.raises(UserError) as error:
            action()
        assert message in str(error.value)


def test_a_remote_index_writes_nothing_outside_the_cache(prepared, store, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(prepared.dataset, store.root / "bucket" / "dataset"))
    spoil_index(folder, filename="../../../x.bin")
    shutil.copy(folder / "train" / "chunk-0-0.bin", store.root / "x.bin")
    before = sorted(tmp_path.rglob("*"))
    storage = store.storage(tmp_path / "deep" / "cache")
    for action in (
        lambda: Manifest.load("s3://bucket/dataset", storage),
        lambda: TokenBlocks("s3://bucket/dataset/train", 32, storage)[0],
    ):
        with pytest.raises(UserError, match=r"names a chunk '../../../x.bin', which is not a plain file name"):
            action()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_remote_dataset_is_compared_with_its_hashes(prepared, store, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(prepared.dataset, store.root / "bucket" / "dataset"))
    storage = store.storage(tmp_path / "cache")
    open_dataset("s3://bucket/dataset", "text", storage)
    manifest = folder / "manifest.json"
    content = manifest.read_text()
    manifest.write_text(content[::-1].replace("1", "2", 1)[::-1])
    with pytest.raises(UserError, match=r"^s3://bucket/dataset/manifest.json is damaged"):
        open_dataset("s3://bucket/dataset", "text", storage)
    manifest.write_text(content)
    file = folder / "val" / "index.json"
    file.write_text(file.read_text().replace("64000000", "64000001"))
    with pytest.raises(UserError, match=r"^s3://bucket/dataset/val/index.json is damaged: its SHA-256 differs from"):
        open_dataset("s3://bucket/dataset", "text", storage)


def test_a_split_that_was_replaced_since_its_manifest_was_read_is_refused(prepared, store, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(prepared.dataset, store.root / "bucket" / "dataset"))
    storage = store.storage(tmp_path / "cache")
    files = Manifest.load("s3://bucket/dataset", storage).splits["train"].files
    locations = ("s3://bucket/dataset/train", f"{folder}/train")
    for location in locations:
        TokenBlocks(location, 32, storage, files)
    index = folder / "train" / "index.json"
    index.write_text(index.read_text() + "\n")
    for location in locations:
        with pytest.raises(UserError, match=rf"^{location}/index.json is damaged: its SHA-256 differs from that in"):
            TokenBlocks(location, 32, storage, files)


def test_a_damaged_index_in_the_cache_is_written_again(prepared, store, tmp_path):  # noqa: F811
    shutil.copytree(prepared.dataset, store.root / "bucket" / "dataset")
    storage = store.storage(tmp_path)
    expected = TokenBlocks("s3://bucket/dataset/train", 32, storage)[3]
    (cached,) = tmp_path.glob("*/index.json")
    good = cached.read_bytes()
    cached.write_bytes(good.replace(b"no_header_tensor:20", b"no_header_tensor:15"))  # other tokens, without a word
    assert torch.equal(TokenBlocks("s3://bucket/dataset/train", 32, storage)[3], expected)
    assert cached.read_bytes() == good


def test_a_split_is_one_of_the_known_folders(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared.dataset, tmp_path / "dataset"))
    make_older(folder)
    file = folder / "manifest.json"
    content = json.loads(file.read_text())
    content["splits"]["../elsewhere"] = content["splits"].pop("val")
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json is damaged: its splits are train, ../elsewhere; copy"):
        Manifest.load(str(folder))


def pickled_table(file, trace):
    np.savez(file, num_tokens=np.array([Harm(trace)], dtype=object))


def bomb_table(file, trace):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("num_tokens.npy", bytes(10_000_000))


@pytest.mark.parametrize(
    ("write", "message"),
    [(pickled_table, "Object arrays cannot be loaded"), (bomb_table, r"its \d+ bytes unpack to 10000000")],
)
def test_a_table_of_samples_is_numbers_only(chat, tmp_path, write, message):
    folder = Path(shutil.copytree(chat, tmp_path / "dataset"))
    write(folder / "train" / "samples.npz", tmp_path / "trace")
    with pytest.raises(UserError, match=rf"train/samples.npz is damaged: {message}"):
        load_samples(str(folder), "train")
    assert not (tmp_path / "trace").exists()


# ------------------------------------------------------------------------------ models, tokenizers, templates


def test_files_of_weights_are_in_their_folder(source_folder, tmp_path):
    folder = Path(shutil.copytree(source_folder, tmp_path / "model"))
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    weight_map = {"model.embed_tokens.weight": "../model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"names a file '../model.safetensors' that is not a .safetensors of its own"):
        HFFolder.open(folder)


def test_code_of_a_model_is_ignored(source_folder, tmp_path):
    folder = Path(shutil.copytree(source_folder, tmp_path / "model"))
    code = {"AutoConfig": "code.Harm", "AutoModelForCausalLM": "code.Harm", "AutoTokenizer": ["code.Harm", "code.Harm"]}
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "auto_map": code}))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    assert main(["generate", "--checkpoint", str(folder), "--prompt", "a", "--max_new_tokens", "2"]) == 0
    assert main(["export", "--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "trace").exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert not any("auto_map" in file.read_text() for file in (tmp_path / "out").glob("*.json"))


def test_links_within_a_folder_are_followed(source_folder, prepared, folder, tmp_path):
    model, dataset = (
        Path(shutil.copytree(path, tmp_path / "in" / name))
        for path, name in ((source_folder, "model"), (prepared.dataset, "dataset"))
    )
    for file in [model / "model.safetensors", next(dataset.glob("train/*.bin")), next(folder.glob("*.distcp"))]:
        elsewhere = file.rename(tmp_path / f"elsewhere{file.suffix}")
        file.symlink_to(elsewhere)
    assert HFFolder.open(model).read("norm.weight").shape == (32,)
    open_dataset(dataset, "text")
    assert TokenBlocks(f"{dataset}/train", 32)[0].numel()
    check(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_deep_nesting_ends_in_one_line(source_folder, tmp_path, name):
    folder = Path(shutil.copytree(source_folder, tmp_path / "model"))
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(UserError, match=rf"{name}(:| is) not valid JSON"):
        (HFFolder.open if name == "config.json" else lambda path: Tokenizer.load(str(path)))(folder)


def test_a_flip_anywhere_in_a_tokenizer_ends_in_no_traceback(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared.tokenizer, tmp_path / "tokenizer"))
    num_named = 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_bytes()
        for damaged in flips(content, 150, seed=3):
            (folder / name).write_bytes(damaged)
            try:
                ChatTemplate.load("alpaca", Tokenizer.load(str(folder))).encode_prompt([])
            except UserError:
                num_named += 1
        (folder / name).write_bytes(content)
    assert num_named > 150


def nested(count):
    return "{% for x in range(99999) %}" * count + "x" + "{% endfor %}" * count


GROWING = "{% set n = namespace(s='12345678') %}{% for i in range(60) %}{% set n.s = OPERATION %}{% endfor %}"

DOUBLING = (
    "{% set n = namespace(a=['x'], b=['x']) %}"
    "{% for _ in range(60) %}{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}USE"
)
BOMBS = {
    "loops": nested(3),
    "block": "{% set x %}" + nested(2) + "{% endset %}",
    "product": "{{ 'x' * 10**10 }}",
    "list": "{{ [1] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "sum": GROWING.replace("OPERATION", "n.s + n.s"),
    "concatenation": GROWING.replace("OPERATION", "n.s ~ n.s"),
    "method": "{{ 'x'.ljust(10**10) }}",
    "filter": "{{ 'x' | center(10**10) }}",
    "replace": "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "range": "{{ range(10**10) | list }}",
    "nested lists": DOUBLING.replace("USE", "{{ n.a }}"),
    "nested lists joined": DOUBLING.replace("USE", "{{ 'x' ~ n.a }}"),
    "nested lists as JSON": DOUBLING.replace("USE", "{{ n.a | tojson }}"),
    "nested lists as upper case": DOUBLING.replace("USE", "{{ n.a | upper | length }}"),
    "nested lists in a format": DOUBLING.replace("USE", "{{ ('%s' % (n.a,)) | length }}"),
    "nested lists in a method": DOUBLING.replace("USE", "{{ '{}'.format(n.a) | length }}"),
    "nested lists compared": DOUBLING.replace("USE", "{{ n.a == n.b }}"),
    "nested lists in a test": DOUBLING.replace("USE", "{{ n.a is eq(n.b) }}"),
    "nested lists in a filter by a test": DOUBLING.replace("USE", "{{ [n.a] | select('eq', n.b) | list | length }}"),
    "nested lists in loop.changed": DOUBLING.replace(
        "USE", "{% for _ in [1, 2] %}{{ loop.changed([n.a, n.b][loop.index0]) }}{% endfor %}"
    ),
    "nested tuples as a key": DOUBLING.replace("[n.a, n.a]", "(n.a, n.a)").replace("USE", "{{ {n.a: 1} | length }}"),
    "nested tuples as an index": DOUBLING.replace("[n.a, n.a]", "(n.a, n.a)").replace("USE", "{{ {1: 2}[n.a] }}"),
    "translate": "{{ ('x' * 9999).translate({120: 'y' * 9999}) | length }}",
    "nested lists in a namespace": DOUBLING.replace("USE", "{{ n }}"),
    "width from a value": "{{ ('%*d' % (2000000, 1)) | length }}",
    "precision from a value": "{{ ('%.*f' % (2000000, 1)) | length }}",
    "width from a field": "{{ '{0[0]:{0[1]}}'.format([1, 2000000]) | length }}",
    "a long text many times": "{{ ('%(a)s' * 9999) % {'a': 'x' * 9999} }}",
    "a long field many times": "{{ ('{0}' * 9999).format('x' * 9999) }}",
    "references joined": "{{ ''.join(['x' * 99999] * 99999) }}",
    "text without end": "{{ lipsum(n=9999, min=9000, max=9999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{% if true %}" * 500 + "{% endif %}" * 500,
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_never_ends_or_fills_the_memory_ends_in_one_line(prepared, name, monkeypatch):
    monkeypatch.setattr("meap_lit.tokenizer.bounded_jinja.BUDGET", 1_000_000)  # less, for time
    tokenizer = Tokenizer.load(prepared.tokenizer)
    with pytest.raises(UserError, match=r"^chat template bomb ") as error:
        ChatTemplate("bomb", BOMBS[name], tokenizer).encode_prompt([{"role": "user", "content": "a" * 1000}])
    assert "\n" not in str(error.value)


def test_what_looks_like_a_bomb_and_is_none_renders(prepared):
    source = (
        "{{ '{{\"name\": \"{}\"}}'.format('a') }} {{ '%-3s|%5.1f%%' % ('b', 2) }} {{ ', '.join(['c', 'd']) }} "
        "{% for m in messages %}{% if m.role in ['user', 'system'] and m == messages[0] %}"
        "{{ m | tojson }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.load(prepared.tokenizer)
    messages = [{"role": "user", "content": "e" * 1000}] * 100
    assert ChatTemplate("plain", source, tokenizer).encode_prompt(messages)


def test_an_exponential_macro_ends(prepared, monkeypatch):
    monkeypatch.setattr("meap_lit.tokenizer.bounded_jinja.BUDGET", 1_000_000)
    source = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    with pytest.raises(UserError, match=r"it takes more than 1,000,000 steps and characters"):
        ChatTemplate("bomb", source, Tokenizer.load(prepared.tokenizer)).encode_prompt([])


# -------------------------------------------------------------------------- what earlier commands left behind


def test_answers_of_an_evaluation_are_json_and_damage_is_named(tmp_path):
    records = Records(tmp_path / "out", {"task": "x", "weights": "1 byte"})
    records.begin("items")
    records.add([{"id": "1", "answer": "a"}, {"id": "2", "answer": "b"}])
    (answers,) = (tmp_path / "out").glob("*.jsonl*")
    answers.write_bytes(answers.read_bytes().replace(b'"id"', b'"ie"', 1))
    with pytest.raises(UserError, match=rf"^{answers}:1 is not an answer of evaluate \('id'\); remove that line$"):
        records.read()
    (settings,) = (path for path in (tmp_path / "out").iterdir() if path != answers)
    settings.write_text("{")
    with pytest.raises(UserError, match=rf"^{settings}: not valid JSON .*; remove the folder .* to evaluate again$"):
        Records(tmp_path / "out", {"task": "x"})


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    partial_path(tmp_path / "file").symlink_to(tmp_path / "mine")
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "mine").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_nothing_behind_a_link_beside_an_output_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    ended = partial_path(tmp_path / "out").name.replace(f"-{os.getpid()}@", "-4194304@")
    (tmp_path / ended).symlink_to(tmp_path / "mine")
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert (tmp_path / "mine" / "file").is_file()


@pytest.mark.parametrize("content", ["{", "[]", '{"step": "PrepareText"}', "[" * 100_000])
def test_a_damaged_record_of_a_preparation_is_named(prepared, tmp_path, content):
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "preparation.json").write_text(content)
    step = PrepareText(input=[str(prepared.texts)], tokenizer=prepared.tokenizer, output=str(folder))
    with pytest.raises(UserError, match=rf"^{folder}/preparation.json(: not| is dam).*; remove the folder or name"):
        step.ensure()
