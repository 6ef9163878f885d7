import dataclasses
import logging
import re
import socket
import time

import pytest
from fsspec import AbstractFileSystem

from meap_lit.data.pretraining import PretrainingData
from meap_lit.data.store.remote import Storage
from meap_lit.errors import UserError
from tests.support.object_store import one_store, store  # noqa: F401  fixtures

pytestmark = pytest.mark.slow

CONTENT = bytes(range(256)) * 20
ADDRESS = "s3://bucket/folder/object"


@pytest.fixture
def filled(store):  # noqa: F811
    file = store.root / "bucket" / "folder" / "object"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    return store


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("meap_lit.data.store.remote._LONGEST_PAUSE", 0.01)


FAULTS = {
    "reset": "Connection was closed before we received a valid response",
    "500": r"InternalError \(status 500\): told to",
    "503": r"SlowDown \(status 503\): told to",
    "stall": "Read timeout on endpoint URL",
    "trickle": r"only \d+ of 5120 bytes arrived in [12] seconds",
    "truncate": "2560 of 5120 bytes|2560 bytes read, 2560 more expected",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_not_seen(filled, tmp_path, fault):
    filled.fault = lambda key, number: fault if number < 2 else None
    assert filled.storage(tmp_path, timeout=0.5).read(ADDRESS) == CONTENT
    assert filled.requests["bucket/folder/object"] == 3


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_a_fault_that_stays_ends_in_one_line(filled, tmp_path, fault, message):
    filled.fault = lambda key, number: fault
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"cannot read {ADDRESS} \(tries: 2\): .*({message})") as error:
        filled.storage(tmp_path, tries=2, timeout=0.5).read(ADDRESS)
    assert "\n" not in str(error.value)
    assert filled.requests["bucket/folder/object"] == 2
    assert time.monotonic() - start < 30, "each try is given up in time"


def test_wrong_content_is_read_again(filled, tmp_path):
    filled.fault = lambda key, number: "flip" if number == 0 else None

    def problem(file):
        file.seek(0)
        return None if file.read() == CONTENT else "has a flipped byte"

    with open(tmp_path / "file", "w+b") as file:
        file.write(b"x" * 10_000)  # of another try, and longer
        filled.storage(tmp_path).download(ADDRESS, file, problem)
        assert filled.requests["bucket/folder/object"] == 2
    assert (tmp_path / "file").read_bytes() == CONTENT
    filled.fault = lambda key, number: "flip"
    message = rf"cannot read {ADDRESS} \(tries: 3\): has a flipped byte"
    with open(tmp_path / "file", "w+b") as file, pytest.raises(UserError, match=message):
        filled.storage(tmp_path).download(ADDRESS, file, problem)


def test_damaged_json_is_read_again(filled, tmp_path):
    (filled.root / "bucket" / "index.json").write_text('{"a": 1}')  # the flip makes the last brace a |
    filled.fault = lambda key, number: "flip" if number == 0 else None
    assert filled.storage(tmp_path).read("s3://bucket/index.json") == b'{"a": 1}'
    filled.fault = lambda key, number: "flip"
    with pytest.raises(
        UserError, match=r"cannot read s3://bucket/index.json \(tries: 3\): its content: not valid JSON"
    ):
        filled.storage(tmp_path).read("s3://bucket/index.json")


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("s3://bucket/none", {}, r"cannot read s3://bucket/none at http://127.*NoSuchKey.*is it part of a dataset"),
        ("s3://other/object", {}, r"NoSuchBucket.*check the name of the bucket and AWS_ENDPOINT_URL"),
        (
            ADDRESS,
            {"aws_access_key_id": "wrong"},
            r"InvalidAccessKeyId.*check the address, AWS_ENDPOINT_URL and",
        ),
        (ADDRESS, {"endpoint_url": "127.0.0.1"}, r"Invalid endpoint: 127.0.0.1; check AWS_ENDPOINT_URL"),
        (ADDRESS, {"endpoint": "x"}, r"unexpected keyword argument 'endpoint'; check .* data.storage_options"),
        ("s3://b*d/object", {}, r"Invalid bucket name .b\*d.*; check the address"),
        ("s3:///object", {}, "address s3:///object must begin with one of s3, .* and ://, then name a bucket or host"),
        (
            "s3://key:secret@bucket/object",
            {},
            "^the address of object must not hold credentials; put them into the env",
        ),
        ("ftp://host/object", {}, "address ftp://host/object must begin with one of s3, r2, gs, az, .* and ://"),
    ],
)
def test_what_does_not_pass_is_tried_once(filled, tmp_path, address, options, message):
    storage = filled.storage(tmp_path)
    storage = dataclasses.replace(storage, options=storage.options | options)
    with pytest.raises(UserError, match=message) as error:
        storage.read(address)
    assert "\n" not in str(error.value)
    assert sum(filled.requests.values()) <= 1


def test_an_endpoint_that_nobody_answers(filled, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening
        options = {**filled.storage(tmp_path).options, "endpoint_url": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        with pytest.raises(UserError, match=r"\(tries: 3\): Could not connect to the endpoint URL"):
            filled.storage(tmp_path, options=options).read(ADDRESS)


def test_endpoint_and_credentials_come_from_the_environment(filled, monkeypatch):
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "NO_PROXY")
    for name in names:
        monkeypatch.setenv(name, filled.environment[name])
    assert Storage(timeout=7.1).read(ADDRESS) == CONTENT  # a plain http:// endpoint
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r'\(tries: 1\): Could not connect to the endpoint URL: "http://127.0.0.1:9/'):
        Storage(timeout=7.2, tries=1).read(ADDRESS)


def test_without_credentials(filled, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    options = {"endpoint_url": filled.endpoint}
    with pytest.raises(UserError, match=r"Unable to locate credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS"):
        filled.storage(tmp_path, options=options).read(ADDRESS)


# ---------------------------------------------------------------------------------------------- by fsspec


@pytest.fixture
def web(filled):
    """The address of the object for anybody, without S3's protocol."""
    return f"{filled.endpoint}/files/bucket/folder/object"


WEB_FAULTS = {
    "reset": "ServerDisconnectedError|ClientOSError|Server disconnected",
    "500": "ClientResponseError: 500",
    "stall": "Timeout",
    "trickle": r"only \d+ of None bytes arrived in [12] seconds",
    "truncate": "ClientPayloadError",
}


@pytest.mark.parametrize(("fault", "message"), WEB_FAULTS.items())
def test_faults_of_the_web(filled, web, fault, message):
    storage = Storage(tries=2, timeout=0.5)
    filled.fault = lambda key, number: fault if number < 1 else None
    assert storage.read(web) == CONTENT
    assert filled.requests["bucket/folder/object"] == 2
    filled.fault = lambda key, number: fault
    with pytest.raises(UserError, match=rf"^cannot read {web} \(tries: 2\): .*({message})") as error:
        storage.read(web)
    assert "\n" not in str(error.value)


def test_what_does_not_pass_on_the_web_is_tried_once(filled, web):
    with pytest.raises(
        UserError, match=r"^cannot read \S+/none: ClientResponseError: 404, .*; check the address and the cred"
    ):
        Storage().read(f"{web}/none")
    assert filled.requests["bucket/folder/object/none"] == 1


def test_a_file_system_that_is_not_installed():
    with pytest.raises(
        UserError, match=r"^reading gs://bucket/x needs a package: pip install 'meap-lit\[gs\]' \(.*gcsfs"
    ):
        Storage(tries=1).read("gs://bucket/x")


class Unreachable(AbstractFileSystem):
    """Fails as gcsfs and adlfs do: it tries again by itself, then logs what it raises."""

    requests = 0

    def info(self, path, **options):
        type(self).requests += 1
        try:
            raise OSError("Cannot connect\nto host")
        except OSError:
            logging.getLogger("gcsfs").exception("out of retries")
            raise

    open = info


@pytest.mark.parametrize("address", ["gs://bucket/x.txt", "abfs://container@account.dfs.core.windows.net/x.txt"])
@pytest.mark.parametrize("method", ["find", "read"])
def test_a_file_system_that_tries_by_itself_is_asked_once_and_logs_nothing(monkeypatch, caplog, address, method):
    monkeypatch.setattr("fsspec.filesystem", lambda scheme, **options: Unreachable())
    monkeypatch.setattr(Unreachable, "requests", 0)
    message = f"cannot read {address}: OSError: Cannot connect to host; check the address and the credentials"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        getattr(Storage(), method)(address)
    assert Unreachable.requests == 1
    assert not caplog.records


def test_a_dataset_in_a_container_of_azure_has_no_credentials_in_its_address():
    address = "abfs://container@account.dfs.core.windows.net/text"
    assert PretrainingData(address, "tokenizer", seq_len=8, global_batch_size=1).datasets == {address: 1}
    with pytest.raises(UserError, match=r"^data.datasets: the address of text must not hold credentials"):
        PretrainingData("s3://key:secret@bucket/text", "tokenizer", seq_len=8, global_batch_size=1)


def test_credentials_in_an_address_of_azure_are_refused():
    with pytest.raises(UserError, match=r"^the address of x must not hold credentials"):
        Storage().read("az://name:secret@host/x")


# ---------------------------------------------------------------------------------------------- what is there


def test_objects_are_found_by_name_folder_and_pattern(store):  # noqa: F811
    for name in ("a.txt", "b/a.txt", "b/c/d.txt", "bc.txt"):
        file = store.root / "bucket" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)

    def find(address):
        return {file.address.removeprefix("s3://bucket/"): file.size for file in store.storage("").find(address)}

    assert find("s3://bucket/a.txt") == {"a.txt": 5}
    assert find("s3://bucket/b") == find("s3://bucket/b/") == {"b/a.txt": 7, "b/c/d.txt": 9}
    assert find("s3://bucket/*.txt") == {"a.txt": 5, "bc.txt": 6}
    assert find("s3://bucket/b/**/*.txt") == find("s3://bucket/b")
    assert len(find("s3://bucket")) == len(find("s3://bucket/")) == 4
    assert find("s3://bucket/none") == {}
    (found,) = Storage().find(f"{store.endpoint}/files/bucket/b/a.txt")
    assert (found.size, found.name, found.open().read()) == (7, "a.txt", b"b/a.txt")
    with pytest.raises(UserError, match=r"NoSuchBucket"):
        find("s3://other/a")
