import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import meap_lit.data.store.cache as cache_module
from meap_lit.data.store.cache import CachedChunks
from meap_lit.data.store.remote import Storage
from meap_lit.data.store.writers import ChatWriter, TokenWriter
from meap_lit.data.stream.chat import ChatSamples
from meap_lit.data.stream.micro_batches import Slice, TrainStream
from meap_lit.data.stream.order import MixedOrder, ShuffledOrder
from meap_lit.data.stream.text import BlockReader, TokenBlocks
from meap_lit.errors import UserError
from tests.support.object_store import one_store, store  # noqa: F401  fixtures

pytestmark = pytest.mark.slow

SEQ_LEN = 7
NUM_CHUNKS = 24
ADDRESS = "s3://bucket/train"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("meap_lit.data.store.remote._LONGEST_PAUSE", 0.01)


def write_text(folder):
    """Chunks of ten blocks; block number i holds the tokens 8 * i, ..., 8 * i + 7."""
    writer = TokenWriter(folder, np.dtype(np.uint16), chunk_bytes=165)
    for first in range(0, NUM_CHUNKS * 80, 8):
        writer.add(np.arange(first, first + 8, dtype=np.uint16))
    return writer.close()


def write_chat(folder):
    """Conversations whose first token is their number; the first and last of each token are an answer."""
    writer = ChatWriter(folder, np.dtype(np.uint16), chunk_bytes=300)
    for number in range(60):
        tokens = np.full(3 + number % 5, number, dtype=np.uint16)
        writer.add((tokens, np.array([[0, 1, 1], [len(tokens) - 1, len(tokens), len(tokens)]], dtype=np.int32)))
    return writer.close()


@pytest.fixture
def bucket(store):  # noqa: F811
    """A store with the text of `write_text` at ADDRESS."""
    write_text(store.root / "bucket" / "train")
    return store


def chunk_sizes(folder):
    return [chunk["chunk_bytes"] for chunk in json.loads((folder / "index.json").read_text())["chunks"]]


def held_on_disk(cache_dir):
    """Bytes of all chunks. Under the cache's own lock, since files come and go while they are counted."""
    with open(cache_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # one that is renamed meanwhile is met under either name
        return sum({str(path).removesuffix(".part"): size for _, size, path in cache_module._files(cache_dir)}.values())


def train_stream(blocks):
    order = MixedOrder([ShuffledOrder(blocks.chunk_sizes, (3, 0))], [1.0], seed=3)
    reader = BlockReader([blocks], SEQ_LEN, vocab_size=2000)
    return TrainStream(order, reader, rank_slice=Slice(), global_batch_size=4, micro_batch_size=4, start=0)


def rows(stream, num_workers=0, num_batches=3 * NUM_CHUNKS * 10 // 4):
    """The rows of three epochs."""
    batches = islice(DataLoader(stream, batch_size=None, num_workers=num_workers), num_batches)
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


# ---------------------------------------------------------------------------------------------- what is read


def test_writers_hash_every_chunk_and_litdata_reads_on(tmp_path):
    write_text(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index["chunks"]) == NUM_CHUNKS
    for chunk in index["chunks"]:
        assert chunk["sha256"] == hashlib.sha256((tmp_path / chunk["filename"]).read_bytes()).hexdigest()
    blocks = TokenBlocks(str(tmp_path), SEQ_LEN)
    assert [blocks[index].tolist() for index in (0, 100, 239)] == [list(range(i * 8, i * 8 + 8)) for i in (0, 100, 239)]


def test_remote_blocks_are_the_local_ones_and_each_chunk_is_fetched_once(bucket, tmp_path):
    local = TokenBlocks(str(bucket.root / "bucket" / "train"), SEQ_LEN)
    remote = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))
    assert len(remote) == len(local) == 240
    assert rows(train_stream(remote)) == rows(train_stream(local))
    fetched = {key: count for key, count in bucket.requests.items() if key.endswith(".bin")}
    assert len(fetched) == NUM_CHUNKS
    assert set(fetched.values()) == {1}
    again = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))
    assert torch.equal(again[17], local[17])
    assert {key: count for key, count in bucket.requests.items() if key.endswith(".bin")} == fetched


def test_remote_conversations_are_the_local_ones(store, tmp_path):  # noqa: F811
    folder = store.root / "bucket" / "chat"
    write_chat(folder)
    sizes = [chunk["chunk_size"] for chunk in json.loads((folder / "index.json").read_text())["chunks"]]
    assert len(sizes) > 5
    local = ChatSamples(str(folder), 100)
    remote = ChatSamples("s3://bucket/chat", 100, store.storage(tmp_path))
    for number in np.random.default_rng(0).permutation(60):
        tokens, answers = remote[number]
        assert tokens.tolist() == [number] * (3 + number % 5)
        assert answers == local[number][1]
    assert sum(count for key, count in store.requests.items() if key.endswith(".bin")) == len(sizes)


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(("fault", "num_workers"), [("flip", 0), ("truncate", 0), ("reset", 0), ("500", 2)])
def test_a_chunk_with_a_fault_is_fetched_again(bucket, tmp_path, fault, num_workers):
    local = TokenBlocks(str(bucket.root / "bucket" / "train"), SEQ_LEN)
    remote = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))
    bucket.fault = lambda key, number: fault if key.endswith(".bin") and number < 2 else None
    expected = rows(train_stream(local), num_batches=20)
    assert rows(train_stream(remote), num_workers, num_batches=20) == expected
    assert max(bucket.requests.values()) == 3, "no fault occurred"


def test_forked_workers_read_by_fsspec_after_their_parent_did(bucket, tmp_path):
    local = TokenBlocks(str(bucket.root / "bucket" / "train"), SEQ_LEN)
    remote = TokenBlocks(f"{bucket.endpoint}/files/bucket/train", SEQ_LEN, Storage(str(tmp_path), tries=2, timeout=5.0))
    assert remote[0].tolist() == local[0].tolist()
    expected = rows(train_stream(local), num_batches=20)
    assert rows(train_stream(remote), num_workers=2, num_batches=20) == expected


def test_a_chunk_that_stays_wrong_is_named(bucket, tmp_path):
    remote = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))
    bucket.fault = lambda key, number: "flip" if key.endswith("-3.bin") else None
    message = rf"cannot read {ADDRESS}/chunk-0-3.bin \(tries: 3\): differs from its SHA-256 in index.json"
    with pytest.raises(UserError, match=message):
        rows(train_stream(remote))
    (folder,) = (path for path in tmp_path.iterdir() if len(path.name) == 32)
    assert not (folder / "chunk-0-3.bin").exists(), "what is wrong does not stay"


def test_what_a_killed_run_left_is_not_trusted(bucket, tmp_path):
    folder = bucket.root / "bucket" / "train"
    remote = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))
    (cached,) = (path for path in tmp_path.iterdir() if len(path.name) == 32)
    whole = (folder / "chunk-0-0.bin").read_bytes()
    (cached / "chunk-0-0.bin").write_bytes(whole[:-1])
    (cached / "chunk-0-1.bin").write_bytes(b"\0" * len((folder / "chunk-0-1.bin").read_bytes()))
    (cached / "chunk-0-2.bin.part").write_bytes(b"half" * 100)
    for index in (5, 15, 25):
        assert remote[index].tolist() == list(range(index * 8, index * 8 + 8))
    assert (cached / "chunk-0-0.bin").read_bytes() == whole
    assert not list(cached.glob("*.part"))


def test_a_chunk_that_another_process_fetches_is_waited_for(bucket, tmp_path):
    chunks = CachedChunks(ADDRESS, bucket.storage(tmp_path), None)
    done = threading.Event()

    def read():
        chunks.ensure(0)
        done.set()

    with open(f"{chunks.folder}/chunk-0-0.bin.part", "w") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert not done.wait(0.3)
        assert bucket.requests["bucket/train/chunk-0-0.bin"] == 0
    assert done.wait(30), "the other process died: its lock is free"
    reader.join()


def test_other_data_at_the_same_address_is_not_mixed_up(bucket, tmp_path):
    assert int(TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))[0][0]) == 0
    shutil.rmtree(bucket.root / "bucket" / "train")
    writer = TokenWriter(bucket.root / "bucket" / "train", np.dtype(np.uint16), chunk_bytes=165)
    for first in range(0, NUM_CHUNKS * 80, 8):
        writer.add(np.arange(first + 1, first + 9, dtype=np.uint16))
    writer.close()
    assert int(TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))[0][0]) == 1


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_damaged_local_chunk_is_named(tmp_path, kind):
    (write_text if kind == "text" else write_chat)(tmp_path)

    def first():
        return TokenBlocks(str(tmp_path), SEQ_LEN)[0] if kind == "text" else ChatSamples(str(tmp_path), 100)[0]

    file = tmp_path / "chunk-0-0.bin"
    whole = file.read_bytes()
    assert first() is not None
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"chunk .*chunk-0-0.bin differs from its SHA-256 in index.json; the dataset"):
        first()
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read chunk .*chunk-0-0.bin: No such file"):
        first()


def test_a_dataset_without_hashes_opens(bucket, tmp_path):
    file = bucket.root / "bucket" / "train" / "index.json"
    index = json.loads(file.read_text())
    for chunk in index["chunks"]:
        del chunk["sha256"]
    file.write_text(json.dumps(index))
    bucket.fault = lambda key, number: "truncate" if key.endswith(".bin") and number == 0 else None
    for blocks in (TokenBlocks(str(file.parent), SEQ_LEN), TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path))):
        assert blocks[239].tolist() == list(range(239 * 8, 240 * 8))
    assert bucket.requests["bucket/train/chunk-0-23.bin"] == 2


def test_a_cache_that_cannot_be_written(bucket, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the cache .*file: Not a directory; name another data.cache_dir"):
        TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path / "file"))
    blocks = TokenBlocks(ADDRESS, SEQ_LEN, bucket.storage(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"cannot keep .*chunk-0-0.bin: No such file or directory; name another"):
        blocks[0]


# ---------------------------------------------------------------------------------------------- the bound


# a worker that is forked while a watch holds the lock of the cache would inherit it and never give it back
_watching = threading.Lock()
os.register_at_fork(before=_watching.acquire, after_in_parent=_watching.release, after_in_child=_watching.release)


class Watch:
    """The most bytes that a cache held while something ran."""

    def __init__(self, cache_dir):
        self.cache_dir = cache_dir
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self):
        while not self._stop.is_set():
            with _watching:
                self.most = max(self.most, held_on_disk(self.cache_dir))
            time.sleep(0.001)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize(("num_workers", "num_chunks", "limit"), [(0, 20, 20), (0, 2, 17), (2, 20, 34)])
def test_the_cache_stays_within_its_bound_and_what_is_in_use(bucket, tmp_path, num_workers, num_chunks, limit):
    """`limit` in chunks: the bound if what is in use fits, else 16 a process and the one that is being fetched."""
    largest = max(chunk_sizes(bucket.root / "bucket" / "train"))
    local = TokenBlocks(str(bucket.root / "bucket" / "train"), SEQ_LEN)
    storage = bucket.storage(tmp_path / "cache", cache_bytes=num_chunks * largest)
    remote = TokenBlocks(ADDRESS, SEQ_LEN, storage)
    with Watch(tmp_path / "cache") as watch:
        assert rows(train_stream(remote), num_workers) == rows(train_stream(local))
    assert 0 < watch.most <= limit * largest
    assert sum(bucket.requests.values()) > NUM_CHUNKS + 10, "nothing had to go"


def test_files_of_other_datasets_go_first_and_files_of_others_stay(bucket, tmp_path):
    shutil.copytree(bucket.root / "bucket" / "train", bucket.root / "bucket" / "old")
    largest = max(chunk_sizes(bucket.root / "bucket" / "train"))
    storage = bucket.storage(tmp_path, cache_bytes=NUM_CHUNKS * largest)
    old = CachedChunks("s3://bucket/old", storage, None)
    for number in range(10):
        old.ensure(number)
    old.release()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "chunk.bin").write_bytes(b"x" * 10_000)
    new = CachedChunks(ADDRESS, storage, None)
    for number in range(NUM_CHUNKS):
        new.ensure(number)
    assert not list((tmp_path / old.folder).glob("*.bin"))
    assert len(list((tmp_path / new.folder).glob("*.bin"))) == NUM_CHUNKS
    assert (tmp_path / "mine" / "chunk.bin").exists()
    # what is in use stays, whatever the bound
    new.ensure(0)
    tight = CachedChunks("s3://bucket/old", bucket.storage(tmp_path, cache_bytes=1), None)
    tight.ensure(0)
    assert len(list((tmp_path / new.folder).glob("*.bin"))) == cache_module.NUM_HELD
