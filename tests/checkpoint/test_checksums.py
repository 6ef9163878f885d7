"""Damage is found and named, whatever it is; the newest whole checkpoint of a run is found."""

import hashlib
import json
import os
import shutil
import zipfile
from unittest import mock

import pytest
import torch

from meap_lit.checkpoint import checksums as module
from meap_lit.checkpoint.checksums import checksums, is_whole, recorded, seal, verify
from meap_lit.checkpoint.find import find_checkpoint, newest_checkpoint
from meap_lit.errors import UserError
from tests.support.checkpoints import save_as_0_1


def make_file(path, size=1000):
    save_as_0_1({"global_step": 3, "state_dict": {"a": torch.arange(size)}}, path)
    return path


def make_folder(path, sealed=True):
    path.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "meta.pt"):
        (path / name).write_bytes(os.urandom(300))
    if sealed:
        seal(path, checksums(path))
    return path


def pieces_hash(content):
    size = 16 * 1024 * 1024
    digests = [hashlib.sha256(content[start : start + size]).digest() for start in range(0, len(content), size)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def test_a_file_of_version_0_1_carries_its_checksum(tmp_path):
    path = make_file(tmp_path / "a.ckpt", size=5_000_000)  # three pieces
    for mmap in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert torch.equal(loaded["state_dict"]["a"], torch.arange(5_000_000))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        comment = json.loads(archive.comment)
    content = path.read_bytes()[: comment["bytes"]]
    assert len(content) > 2 * 16 * 1024 * 1024
    assert comment["hash"] == pieces_hash(content)
    assert verify(path) == 1


def test_a_folder_carries_the_checksums_of_its_files(tmp_path):
    path = make_folder(tmp_path / "a.ckpt")
    files = json.loads((path / "checksums.json").read_text())["files"]
    assert files.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "meta.pt"}
    for name, about in files.items():
        content = (path / name).read_bytes()
        assert about == {"bytes": 300, "hash": hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()}, name
    assert verify(path) == 5


def test_a_checkpoint_is_on_the_disk_when_it_has_its_checksums(tmp_path):
    path = make_folder(tmp_path / "a.ckpt")
    with mock.patch("os.fsync", wraps=os.fsync) as waits:
        seal(path, checksums(path))
    assert waits.call_count == 3


def test_ranks_share_the_files_out(tmp_path):
    path = make_folder(tmp_path / "a.ckpt")
    parts = [checksums(path, rank, 2) for rank in range(2)]
    assert list(parts[1]) == ["__1_0.distcp"]
    assert {**parts[0], **parts[1]} == recorded(path)
    assert [verify(path, rank, 2) for rank in range(2)] == [4, 1]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_without_checksums_passes(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    if kind == "file":
        torch.save({"state_dict": {}}, path)
    else:
        make_folder(path, sealed=False)
    assert verify(path) is None
    assert is_whole(path)


def flip(file, offset=200):
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def cut(file):
    os.truncate(file, file.stat().st_size - 7)


FILE_DAMAGE = [
    (flip, "is damaged: its content is not what was written", True),
    (cut, "is damaged: its checksums cannot be read", False),
    (lambda file: os.truncate(file, 100), "is cut short, or no checkpoint at all", False),
    (lambda file: os.truncate(file, 0), "is cut short, or no checkpoint at all", False),
    (lambda file: flip(file, file.stat().st_size - 1), "is damaged: its checksums cannot be read", False),
]


@pytest.mark.parametrize(("damage", "message", "looks_whole"), FILE_DAMAGE)
def test_a_damaged_file_is_named(tmp_path, damage, message, looks_whole):
    path = make_file(tmp_path / "a.ckpt")
    damage(path)
    with pytest.raises(UserError, match=rf"^checkpoint file {path} {message}; name an earlier checkpoint$"):
        verify(path)
    assert is_whole(path) == looks_whole


@pytest.mark.parametrize(
    ("name", "damage", "message", "looks_whole"),
    [
        ("__1_0.distcp", flip, "is damaged: its content is not what was written", True),
        ("__1_0.distcp", cut, "is damaged: it has 293 bytes where 300 were written", False),
        ("__2_0.distcp", os.unlink, "is missing", False),
        ("meta.pt", os.unlink, "is missing", False),
        ("checksums.json", cut, "is damaged: its checksums cannot be read", False),
    ],
)
def test_a_damaged_part_is_named(tmp_path, name, damage, message, looks_whole):
    path = make_folder(tmp_path / "a.ckpt")
    damage(path / name)
    with pytest.raises(UserError, match=rf"^checkpoint file {path}/{name} {message}; name an earlier checkpoint$"):
        verify(path)
    assert is_whole(path) == looks_whole


@pytest.mark.parametrize("form", ["file", "folder", "unsealed folder"])
def test_a_checkpoint_that_a_run_removes_is_gone(tmp_path, monkeypatch, form):
    path = tmp_path / "step=4.ckpt"
    if form == "file":
        make_file(path)
    else:
        make_folder(path, sealed=form == "folder")
    message = rf"^checkpoint {path} is gone, as a run removes its old ones; repeat the command \(the folder of a run"
    if form != "unsealed folder":

        def remove_and_hash(file, end):
            path.rename(tmp_path / "aside")
            return hash_of(file, end)

        hash_of = module._hash
        monkeypatch.setattr(module, "_hash", remove_and_hash)
        with pytest.raises(UserError, match=message):
            verify(path)
    else:
        path.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=message):
        verify(path)


def test_a_part_is_hashed_by_its_own_rank_only(tmp_path):
    path = make_folder(tmp_path / "a.ckpt")
    flip(path / "__1_0.distcp")
    assert verify(path, rank=0, num_ranks=2) == 4
    with pytest.raises(UserError, match=r"__1_0.distcp is damaged"):
        verify(path, rank=1, num_ranks=2)


@pytest.mark.parametrize("missing", [".metadata", "meta.pt"])
def test_half_a_folder_without_checksums_is_not_whole(tmp_path, missing):
    path = make_folder(tmp_path / "a.ckpt", sealed=False)
    (path / missing).unlink()
    assert not is_whole(path)


def test_the_newest_whole_checkpoint_is_of_the_highest_version_that_has_one(tmp_path):
    run = tmp_path / "run"
    for version, steps in ((2, (5, 10)), (10, (5, 100, 20)), (11, ())):
        (run / f"version_{version}" / "checkpoints").mkdir(parents=True)
        for step in steps:
            make_folder(run / f"version_{version}" / "checkpoints" / f"step={step}.ckpt")
    newest = run / "version_10" / "checkpoints"
    (newest / "last.ckpt").symlink_to("step=5.ckpt")
    (newest / "step=200.ckpt.partial-1@here").write_bytes(b"half")
    assert newest_checkpoint(run) == newest / "step=100.ckpt"
    make_folder(newest / "step=100-v1.ckpt")  # a run that was resumed in its own folder
    for folder in (run, run / "version_10", newest):
        assert newest_checkpoint(folder) == newest / "step=100-v1.ckpt"
    cut(newest / "step=100-v1.ckpt" / "__1_0.distcp")
    cut(newest / "step=100.ckpt" / "meta.pt")
    assert newest_checkpoint(run) == newest / "step=20.ckpt"
    shutil.rmtree(run / "version_10")
    assert newest_checkpoint(run) == run / "version_2" / "checkpoints" / "step=10.ckpt"
    shutil.rmtree(run / "version_2")
    assert newest_checkpoint(run) is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", r"checkpoint .*/nowhere \(--checkpoint\) does not exist"),
        ("run", r".*/run \(--checkpoint\) has no complete checkpoint \(step=N.ckpt\); name another run or a .ckpt"),
        ("weights.pt", r"checkpoint .*/weights.pt \(--checkpoint\) does not end in .ckpt, as those of a run do"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, path, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=f"^{message}$"):
        find_checkpoint(tmp_path / path)
