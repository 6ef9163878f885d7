"""Reading objects from storage that may fail: what passes is tried again, what does not ends in one line.

There is one loop of tries and it is ours, with the retries of botocore switched off: botocore repeats a request that
failed, but not a body that broke off or came with a flipped byte, and a loop in a loop multiplies the waiting.
"""

import contextlib
import io
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from meap_lit.errors import UserError

REMOTE_SCHEMES = ("s3", "gs", "r2", "azure")

_CONNECT_TIMEOUT = 5.0  # seconds
_SLOWEST = 1_000_000  # bytes per second over a whole object; below it a try is given up
_LONGEST_PAUSE = 16.0  # seconds


@dataclass(frozen=True)
class Storage:
    """How remote datasets are read.

    Endpoint, region and credentials of s3:// come from the environment, the way AWS names it: AWS_ENDPOINT_URL (http://
    too) or AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE.

    Args:
        cache_dir: Folder that chunks are kept in; `~/.cache/meap_lit` if not given.
        cache_bytes: Bytes that it may hold, beside what is being read; no limit if not given.
        tries: Tries to read an object. The pause after try n is 2**(n-2) seconds, 16 at most, shortened by up to half.
        timeout: Seconds without a byte after which a try is given up. It is also given up when on the whole it takes
            longer than this and a second per MB.
        options: Arguments of the client: of `boto3.client` for s3://, otherwise as LitData takes them.
    """

    cache_dir: str | None = None
    cache_bytes: int | None = None
    tries: int = 6
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def read(self, address: str) -> bytes:
        """Content of a small object; one that is named .json must be JSON.

        Raises:
            UserError: If it cannot be read.
        """
        buffer = io.BytesIO()
        self.download(address, buffer, _json_problem if address.endswith(".json") else None)
        return buffer.getvalue()

    def download(
        self, address: str, file: io.BufferedIOBase, problem: Callable[[io.BufferedIOBase], str | None] | None = None
    ) -> None:
        """Write an object into `file`, from its beginning and over what it holds.

        Args:
            address: Address of the object, such as s3://bucket/path.
            file: Open for reading and writing.
            problem: Says what is wrong with the content, or None; what is wrong is read again.

        Raises:
            UserError: If it cannot be read, or not as it should be; names the address, what happened and how often.
        """
        for number in range(self.tries):
            if number:
                time.sleep(min(2.0 ** (number - 2), _LONGEST_PAUSE) * _UNSEEDED.uniform(0.5, 1.0))
            file.seek(0)
            try:
                _get(address, file, self)
                file.truncate()
                fault = problem(file) if problem is not None else None
            except _Passing as error:
                fault = str(error)
            if fault is None:
                return
        raise UserError(f"cannot read {address} (tries: {self.tries}): {fault}")


def _json_problem(content: io.BufferedIOBase) -> str | None:
    content.seek(0)
    try:
        json.load(content)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {_line(error)}"
    return None


class _Passing(Exception):
    """A fault that another try may not meet."""


_UNSEEDED = random.Random()  # many processes that fail together should not come back together


def _get(address: str, file: io.BufferedIOBase, storage: Storage) -> None:
    """One try.

    Raises:
        _Passing: If another try may go better.
        UserError: If it would not.
    """
    url = urlsplit(address)
    if url.scheme == "s3" and url.netloc:
        _get_s3(address, url.netloc, url.path.lstrip("/"), file, storage)
    elif url.scheme in REMOTE_SCHEMES and url.netloc:
        _get_by_litdata(address, file, storage)
    else:
        raise UserError(
            f"dataset address {address} must begin with one of {', '.join(REMOTE_SCHEMES)} and ://, then name a bucket"
        )


def _get_s3(address: str, bucket: str, key: str, file: io.BufferedIOBase, storage: Storage) -> None:
    client = _s3_client(storage)
    with _faults_of_s3(f"{address} at {client.meta.endpoint_url}"):
        response = client.get_object(Bucket=bucket, Key=key)
        size = response["ContentLength"]
        start = time.monotonic()
        received = 0
        with response["Body"] as stream:
            # at most what one call of the socket brings: a longer read would wait for a trickle without end
            while piece := stream.read1(2**20):
                try:
                    file.write(piece)
                except OSError as error:  # not one of the network
                    raise UserError(
                        f"cannot keep {address}: {error.strerror}; lower data.cache_bytes or move data.cache_dir"
                    ) from error
                received += len(piece)
                seconds = time.monotonic() - start
                if seconds > storage.timeout + size / _SLOWEST:
                    raise _Passing(f"only {received} of {size} bytes came in {seconds:.0f} seconds")
        if received != size:
            raise _Passing(f"it ended after {received} of {size} bytes")


@contextlib.contextmanager
def _faults_of_s3(what: str) -> Iterator[None]:
    """Tell faults that may pass from those that do not."""
    from botocore import exceptions as botocore
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    passing = (
        botocore.ConnectionError,
        botocore.HTTPClientError,  # a broken connection, or a time-out
        botocore.CredentialRetrievalError,
        botocore.MetadataRetrievalError,
        ResponseParserError,
        HTTPError,
        OSError,
    )
    try:
        yield
    except passing as error:
        raise _Passing(_line(error)) from error
    except botocore.ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        fault = f"{code} (status {status}): {error.response['Error'].get('Message', '')}"
        if status >= 500 or status in (408, 429):
            raise _Passing(fault) from error
        raise UserError(f"cannot read {what}: {fault}; {_HINTS.get(code, _HINTS[''])}") from error
    except botocore.NoCredentialsError as error:
        raise UserError(
            f"cannot read {what}: {_line(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except botocore.BotoCoreError as error:
        raise UserError(f"cannot read {what}: {_line(error)}; {_HINTS['']}") from error


_HINTS = {
    "": "check the address, AWS_ENDPOINT_URL and the credentials",
    "404": "is it part of a dataset made by meap_lit prepare?",
    "NoSuchKey": "is it part of a dataset made by meap_lit prepare?",
    "NoSuchBucket": "check the name of the bucket and AWS_ENDPOINT_URL",
}

_clients: dict[tuple[int, str], Any] = {}


def _s3_client(storage: Storage) -> Any:
    """The client of this process; a fork must not share the connections of its parent."""
    key = (os.getpid(), repr((storage.timeout, storage.options)))
    if key not in _clients:
        # imported here because it takes seconds
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        options = {
            "region_name": os.environ.get("AWS_REGION"),  # boto3 itself reads AWS_DEFAULT_REGION only
            "config": Config(
                connect_timeout=min(_CONNECT_TIMEOUT, storage.timeout),
                read_timeout=storage.timeout,
                retries={"total_max_attempts": 1},
            ),
            **storage.options,
        }
        try:
            _clients[key] = boto3.session.Session().client("s3", **options)
        except (BotoCoreError, TypeError, ValueError) as error:
            raise UserError(
                f"cannot read from s3://: {_line(error)}; check AWS_ENDPOINT_URL, AWS_PROFILE and data.storage_options"
            ) from error
    return _clients[key]


def _get_by_litdata(address: str, file: io.BufferedIOBase, storage: Storage) -> None:
    from litdata.streaming.downloader import get_downloader

    try:
        get_downloader(address, "", [], dict(storage.options)).download_fileobj(address, file)
    except Exception as error:  # each client has classes of its own, which are there only if it is installed
        raise _Passing(f"{type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
