"""Read and list objects of S3, and of other storage with its protocol, by boto3.

s3fs is not used: LitData depends on boto3, and s3fs (aiobotocore) restricts botocore to a few versions.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from meap_lit.errors import UserError, in_one_line

CONNECT_TIMEOUT = 5.0  # seconds


class Passing(Exception):
    """A fault that another try may not meet."""


def fault_of_status(status: int, what: str, fault: str, hint: str) -> Exception:
    """Return the exception for the HTTP status of an answer: `Passing`, or a `UserError` that ends in `hint`."""
    if status >= 500 or status in (408, 429):
        return Passing(fault)
    return UserError(f"cannot read {what}: {fault}; {hint}")


@contextlib.contextmanager
def open_s3(address: str, timeout: float, options: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
    """Open an object as a stream, with its size in bytes; `options` are arguments of `boto3.client`.

    Raises:
        Passing: Here or by the block, if another try may go better, as after `timeout` seconds without a byte.
        UserError: If it would not.
    """
    bucket, key = _bucket_and_key(address)
    client = _client(timeout, options)
    with _faults(f"{address} at {client.meta.endpoint_url}"):
        response = client.get_object(Bucket=bucket, Key=key)
        with response["Body"] as stream:
            yield stream, response["ContentLength"]


def find_s3(address: str, timeout: float, options: Mapping[str, Any]) -> dict[str, int]:
    """Return the addresses and sizes of an object, of all objects of a folder, or of those that match a pattern."""
    from fsspec.utils import glob_translate

    bucket, key = _bucket_and_key(address.rstrip("/"))
    prefix = re.split(r"[*?[]", key)[0]
    pattern = glob_translate(key) if prefix != key else rf"{re.escape(key)}(/.*)?\Z" if key else ""
    client = _client(timeout, options)
    with _faults(f"{address} at {client.meta.endpoint_url}"):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        sizes = {entry["Key"]: entry["Size"] for page in pages for entry in page.get("Contents", ())}
    root = f"{urlsplit(address).scheme}://{bucket}"
    # consoles make objects whose names end in a slash, for folders
    return {f"{root}/{key}": size for key, size in sizes.items() if re.match(pattern, key) and not key.endswith("/")}


def _bucket_and_key(address: str) -> tuple[str, str]:
    bucket = urlsplit(address).netloc
    return bucket, address.partition(f"://{bucket}")[2].lstrip("/")


@contextlib.contextmanager
def _faults(what: str) -> Iterator[None]:
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
        raise Passing(in_one_line(error)) from error
    except botocore.ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        fault = f"{code} (status {status}): {error.response['Error'].get('Message', '')}"
        raise fault_of_status(status, what, fault, _HINTS.get(code, _HINTS[""])) from error
    except botocore.NoCredentialsError as error:
        raise UserError(
            f"cannot read {what}: {in_one_line(error)}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        ) from error
    except botocore.BotoCoreError as error:
        raise UserError(f"cannot read {what}: {in_one_line(error)}; {_HINTS['']}") from error


_HINTS = {
    "": "check the address, AWS_ENDPOINT_URL and the credentials",
    "404": "is it part of a dataset made by meap_lit prepare?",
    "NoSuchKey": "is it part of a dataset made by meap_lit prepare?",
    "NoSuchBucket": "check the name of the bucket and AWS_ENDPOINT_URL",
}


_clients: dict[tuple[int, str], Any] = {}


def _client(timeout: float, options: Mapping[str, Any]) -> Any:
    """Return the client of this process; a fork must not share the connections of its parent."""
    key = (os.getpid(), repr((timeout, options)))
    if key not in _clients:
        # imported here because it takes seconds
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        arguments = {
            "region_name": os.environ.get("AWS_REGION"),  # boto3 itself reads AWS_DEFAULT_REGION only
            "config": Config(
                connect_timeout=min(CONNECT_TIMEOUT, timeout),
                read_timeout=timeout,
                retries={"total_max_attempts": 1},
            ),
            **options,
        }
        try:
            _clients[key] = boto3.session.Session().client("s3", **arguments)
        except (BotoCoreError, TypeError, ValueError) as error:
            raise UserError(
                f"cannot read from s3://: {in_one_line(error)}; check AWS_ENDPOINT_URL, AWS_PROFILE and "
                f"data.storage_options"
            ) from error
    return _clients[key]
