"""Read objects from storage that may fail: try again what may pass, and end in one line otherwise.

`s3.py` reads S3, and fsspec reads everything else. There is one loop of tries, and the retries of botocore
are off: botocore repeats a request that failed, but not a body that broke off or came with a flipped byte, and a
loop in a loop would multiply the waiting. The file systems of gs:// and az:// repeat requests themselves and cannot be
told not to, so an error of theirs is final.
"""

import contextlib
import dataclasses
import glob
import io
import logging
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import urlsplit

from meap_lit.data.store.s3 import CONNECT_TIMEOUT, Passing, fault_of_status, find_s3, open_s3
from meap_lit.errors import UserError, in_one_line
from meap_lit.files import parse_json

_S3 = ("s3", "r2")  # R2 speaks S3's protocol: its address is AWS_ENDPOINT_URL
_EXTRAS = {"gs": "gs", "az": "az", "abfs": "az", "azure": "az"}
"""The extra of this package that installs fsspec's file system for a scheme; those of the others are dependencies."""
REMOTE_SCHEMES = (*_S3, *_EXTRAS, "https", "http", "hf")

_SLOWEST = 1_000_000  # bytes per second over a whole object; below it a try is given up
_LONGEST_PAUSE = 16.0  # seconds


@dataclass(frozen=True)
class Storage:
    """Options by which remote files are read.

    Endpoint, region and credentials of s3:// come from the environment, the way AWS names it: AWS_ENDPOINT_URL (http://
    too) or AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE.

    Args:
        cache_dir: Folder that keeps chunks; `~/.cache/meap_lit` if not given.
        cache_bytes: Bytes that it may hold, beside what is being read; no limit if not given.
        tries: Tries to read an object. The pause after try n is 2**(n-2) seconds, 16 at most, shortened by up to half.
        timeout: Seconds without a byte after which a try is given up. It is also given up when on the whole it takes
            longer than this and a second per MB.
        options: Arguments of `boto3.client` for s3://, otherwise of fsspec's file system.
    """

    cache_dir: str | None = None
    cache_bytes: int | None = None
    tries: int = 6
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hasty(self) -> "Storage":
        """The same with 3 tries at most: a wrong address should be reported sooner than a fault during a run."""
        return dataclasses.replace(self, tries=min(self.tries, 3))

    def read(self, address: str) -> bytes:
        """Return the content of a small object; one that is named .json must be JSON."""
        buffer = io.BytesIO()
        self.download(address, buffer, _json_problem if address.endswith(".json") else None)
        return buffer.getvalue()

    def download(self, address: str, file: IO[bytes], problem: Callable[[Any], str | None] | None = None) -> None:
        """Write an object into `file`, from its beginning and over what it holds.

        `problem` says what is wrong with the content, or None; what is wrong is read again.

        Raises:
            UserError: If it cannot be read, or not as it should be; names the address, what happened and how often.
        """

        def get() -> None:
            file.seek(0)
            _get(address, file, self)
            file.truncate()
            if problem is not None and (fault := problem(file)) is not None:
                raise Passing(fault)

        self._try(address, get)

    def find(self, address: str) -> "list[RemoteFile]":
        """Find objects by the address of one, of a folder, for all in it at any level, or by a glob pattern."""
        return self.hasty._try(address, lambda: _find(address, self))

    def _try(self, address: str, attempt: Callable[[], Any]) -> Any:
        for number in range(self.tries):
            if number:
                time.sleep(min(2.0 ** (number - 2), _LONGEST_PAUSE) * _UNSEEDED.uniform(0.5, 1.0))
            try:
                return attempt()
            except Passing as error:
                fault = str(error)
        raise UserError(f"cannot read {address} (tries: {self.tries}): {fault}")


def _json_problem(content: IO[bytes]) -> str | None:
    content.seek(0)
    try:
        parse_json(content.read(), "its content")
    except UserError as error:
        return str(error)
    return None


DEFAULT_STORAGE = Storage()


@dataclass(frozen=True)
class RemoteFile:
    """A remote file of `size` bytes, read like a `Path` by way of a temporary copy."""

    address: str
    size: int
    storage: Storage

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Download the file and open the copy, which disappears when it is closed."""
        copy = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
        try:
            self.storage.download(self.address, copy)
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return copy


_UNSEEDED = random.Random()  # many processes that fail together should not come back together


def _get(address: str, file: IO[bytes], storage: Storage) -> None:
    """Read an object once; raise `Passing` if another try may go better, `UserError` if it would not."""
    with _open(address, storage) as (stream, size):
        start = time.monotonic()
        received = 0
        # at most what one call of the socket brings: a longer read would wait for a trickle without end
        while piece := (getattr(stream, "read1", None) or stream.read)(2**20):
            try:
                file.write(piece)
            except OSError as error:  # not one of the network
                raise UserError(
                    f"cannot keep {address}: {error.strerror}; lower data.cache_bytes or move data.cache_dir, or set "
                    f"TMPDIR for an input of prepare"
                ) from error
            received += len(piece)
            seconds = time.monotonic() - start
            if seconds > storage.timeout + (size or received) / _SLOWEST:
                raise Passing(f"only {received} of {size} bytes arrived in {seconds:.0f} seconds")
        if size not in (None, received):
            raise Passing(f"it ended after {received} of {size} bytes")


@contextlib.contextmanager
def _open(address: str, storage: Storage) -> Iterator[tuple[Any, int | None]]:
    """Open an object as a stream, with its size if that is known."""
    if scheme_of(address) in _S3:
        with open_s3(address, storage.timeout, storage.options) as opened:
            yield opened
    else:
        with _faults(address), _file_system(address, storage).open(address) as stream:
            yield stream, stream.size


def _find(address: str, storage: Storage) -> list[RemoteFile]:
    if scheme_of(address) in _S3:
        sizes: dict[str, int | None] = {**find_s3(address, storage.timeout, storage.options)}
    else:
        with _faults(address):
            system = _file_system(address, storage)
            if glob.has_magic(address):
                found = system.glob(address, detail=True)
            elif (info := system.info(address))["type"] == "file":
                found = {address: info}
            else:
                found = system.find(address, detail=True)
        sizes = {system.unstrip_protocol(name): info["size"] for name, info in found.items() if info["type"] == "file"}
    files = []
    for name, size in sizes.items():
        if size is None:
            raise UserError(f"cannot read {name}: the server does not report its size; download it first")
        files.append(RemoteFile(name, size, storage))
    return files


def scheme_of(address: str) -> str:
    """Return the scheme of an address that can be read."""
    url = urlsplit(address)
    if url.scheme not in REMOTE_SCHEMES or not url.netloc:
        raise UserError(
            f"address {address} must begin with one of {', '.join(REMOTE_SCHEMES)} and ://, then name a bucket or host"
        )
    # an address of Azure may name its container in front of the host
    if "@" in url.netloc and (":" in url.netloc or _EXTRAS.get(url.scheme) != "az"):
        raise UserError(
            f"the address of {url.path.strip('/')} must not hold credentials; put them into the environment"
        )
    return url.scheme


@contextlib.contextmanager
def _faults(address: str) -> Iterator[None]:
    """Raise `Passing` or a `UserError`; each file system has its own exceptions, most with the status of the answer."""
    try:
        yield
    except (Passing, UserError):
        raise
    except Exception as error:
        # the HTTP file system calls whatever goes wrong a missing file
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        fault = f"{type(cause).__name__}: {in_one_line(cause)}"
        answer = getattr(cause, "response", None)  # of the Hub
        stated = (getattr(at, name, None) for at in (cause, answer) for name in ("status", "code", "status_code"))
        status = next((value for value in stated if isinstance(value, int)), 500)
        tried = urlsplit(address).scheme in _EXTRAS
        if tried or isinstance(cause, (FileNotFoundError, PermissionError, TypeError)):
            status = 400
        raise fault_of_status(status, address, fault, "check the address and the credentials") from error


def _file_system(address: str, storage: Storage) -> Any:
    """Return fsspec's file system for an address."""
    import fsspec

    scheme = urlsplit(address).scheme
    for name in ("gcsfs", "adlfs", "azure"):  # they log what they also raise, gcsfs with a traceback for each try
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if scheme in ("https", "http"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=min(CONNECT_TIMEOUT, storage.timeout), sock_read=storage.timeout
            )
            # a stream instead of a request for each block
            options |= {"client_kwargs": {"timeout": timeout}, "block_size": 0}
        return fsspec.filesystem("az" if scheme == "azure" else scheme, **{**options, **storage.options})
    except ImportError as error:
        extra = f"[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else ""
        raise UserError(
            f"reading {address} needs a package: pip install 'meap-lit{extra}' ({in_one_line(error)})"
        ) from error
    except Exception as error:  # each file system has errors of its own for wrong options and missing credentials
        raise UserError(
            f"cannot read from {scheme}://: {in_one_line(error)}; check the credentials and data.storage_options"
        ) from error
