"""A small server that answers like S3 (GET and lists, path style, signatures not checked) and fails when told to.

At `files/` it serves the same objects to anybody, as a web server does.
"""

import os
import shutil
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from meap_lit.data.store import s3
from meap_lit.data.store.remote import Storage

ACCESS_KEY = "AKIATEST"


class ObjectStore:
    """Serves the folders in `root` as buckets while it is open.

    `fault(key, number)` names what goes wrong at request `number`, from 0, of an object, or is None: `reset`, `500`,
    `503`, `stall`, `trickle`, `truncate`, `flip`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fault = lambda key, number: None
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes of each object that went out."""
        self.closing = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to read from here, and nothing else that is about AWS."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        return others | {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def put_into_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process read from here, by the variables that a user sets."""
        for name, value in self.environment.items():
            if name.startswith("AWS_") or name == "NO_PROXY":
                monkeypatch.setenv(name, value)
        s3._clients.clear()  # they remember the endpoint of another server

    def storage(self, cache_dir: Path, **kwargs) -> Storage:
        """How a test in this process reads from here."""
        options = {
            "endpoint_url": self.endpoint,
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": "secret",
            "region_name": "us-east-1",
        }
        return Storage(**{"cache_dir": str(cache_dir), "tries": 3, "timeout": 1.0, "options": options} | kwargs)

    def count(self, key: str) -> int:
        with self._lock:
            self.requests[key] += 1
            return self.requests[key] - 1

    def add(self, key: str, num_bytes: int) -> None:
        with self._lock:
            self.sent[key] += num_bytes

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    store: ObjectStore
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        key = url.path.lstrip("/").removeprefix("files/")
        fault = self.store.fault(key, self.store.count(key))
        file = self.store.root / key
        signed = url.path.startswith("/files/") or f"Credential={ACCESS_KEY}/" in self.headers.get("Authorization", "")
        if not signed:
            self.refuse(403, "InvalidAccessKeyId")
        elif not (self.store.root / key.split("/")[0]).is_dir():
            self.refuse(404, "NoSuchBucket")
        elif "list-type=2" in url.query:
            self.list(key.strip("/"), parse_qs(url.query).get("prefix", [""])[0])
        elif not file.is_file():
            self.refuse(404, "NoSuchKey")
        elif fault in ("500", "503"):
            self.refuse(int(fault), {"500": "InternalError", "503": "SlowDown"}[fault])
        elif fault == "reset":
            self.break_off()
        else:
            self.answer(key, file.read_bytes(), fault)

    def do_HEAD(self) -> None:
        file = self.store.root / self.path.removeprefix("/files/")
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def list(self, bucket: str, prefix: str) -> None:
        root = self.store.root / bucket
        keys = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
        entries = [
            f"<Contents><Key>{key}</Key><Size>{path.stat().st_size}</Size></Contents>"
            for key, path in keys.items()
            if key.startswith(prefix)
        ]
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, key: str, body: bytes, fault: str | None) -> None:
        if fault == "stall":
            self.store.closing.wait(60)
            self.break_off()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.end_headers()
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "trickle":
            for byte in body:
                if self.store.closing.is_set():
                    return
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        if fault == "truncate":
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.store.add(key, len(body))
        if fault == "truncate":
            self.break_off()

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def break_off(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)  # closing is not enough: a worker forked meanwhile has it open too

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the other side went first, or `break_off` did
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def one_store(tmp_path_factory):
    """One server for a module: a client of boto3 takes half a second to make and remembers its endpoint."""
    store = ObjectStore(tmp_path_factory.mktemp("store"))
    yield store
    store.close()


@pytest.fixture
def store(one_store):
    """A store without faults, with the empty bucket `bucket`."""
    shutil.rmtree(one_store.root / "bucket", ignore_errors=True)
    (one_store.root / "bucket").mkdir()
    one_store.fault = lambda key, number: None
    one_store.requests.clear()
    one_store.sent.clear()
    return one_store
