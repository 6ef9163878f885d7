"""A small server that speaks the part of the Hugging Face Hub's protocol that huggingface_hub 2.4 uses here.

It serves folders as repositories: information on a revision, listings, files (HEAD, GET, ranges). It takes commits,
with large files by way of LFS. The library's own source states what it asks for (`hf_api.py`, `file_download.py`,
`hf_file_system.py`, `lfs.py`). Xet storage is not spoken.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_the_tests"
_KINDS = ("models", "datasets")
_API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<rest>.*))?")
_WRITE = re.compile(r"^/lfs/|/(?:preupload|commit)/[^/]+$|\.git/info/lfs/objects/batch$")
_RESOLVE = re.compile(r"/(?P<datasets>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """Revisions of a repository: folders by commit, and commits by the name of a branch or tag."""

    commits: dict[str, Path] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def folder(self, revision: str) -> tuple[str, Path] | None:
        commit = self.names.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """Serves repositories while it is open."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: Counter[str] = Counter()
        """How often each method and path was asked for."""
        self.tokens: set[str | None] = set()
        """What came as credentials."""
        self.closed: set[str] = set()
        """Organizations in which nobody may create a repository."""
        self.slow = threading.Event()
        """While it is set, a file stops after its first 100,000 bytes, or its first half, until the server closes."""
        self.uploaded: dict[str, bytes] = {}
        """Large files that came, by their SHA-256."""
        self.storage: str | None = None
        """Address of the server that large files come from; this one if None."""
        self.closing = threading.Event()
        self.stalled = threading.Event()
        """Set once a file has stopped."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, name: str, folder: Path, *, branch: str = "main", kind: str = "models", **options) -> str:
        """Make a commit of a folder, which must not change afterwards, on a branch; return its hash."""
        repository = self.repositories.setdefault((kind, name), Repository(**options))
        digest = hashlib.sha1(f"{name} {folder} {len(repository.commits)}".encode()).hexdigest()
        repository.commits[digest] = folder
        repository.names[branch] = digest
        return digest

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to use this server, with its cache in `home`, and nothing else that is about a Hub."""
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return others | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def create(self, name: str, *, private: bool) -> bool:
        """Make an empty repository of a model; return whether there was none."""
        if ("models", name) in self.repositories:
            return False
        self.add(name, Path(tempfile.mkdtemp(prefix="hub-")), private=private)
        return True

    def commit(self, name: str, operations: list[dict]) -> str:
        """Apply the operations of a commit to the main branch, and return the new commit."""
        _, before = self.repositories["models", name].folder("main")
        folder = Path(tempfile.mkdtemp(prefix="hub-"))
        shutil.copytree(before, folder, dirs_exist_ok=True)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                (folder / value["path"]).write_bytes(self.uploaded[value["oid"]])
        return self.add(name, folder)

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests[f"{self.command} {url.path}"] += 1
        body = self._body()
        token = self.headers.get("Authorization")
        self.hub.tokens.add(token)
        if token not in (None, f"Bearer {TOKEN}"):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif url.path == "/api/repos/create" or _WRITE.search(url.path):
            self._write(url.path, token, body)
        elif url.path == "/api/validate-yaml":
            self._send_json({})
        elif match := _API.fullmatch(url.path):
            self._api(match["kind"], match["repo"], match["rest"] or "revision/main", parse_qs(url.query), body)
        elif match := _RESOLVE.fullmatch(url.path):
            kind = "datasets" if match["datasets"] else "models"
            self._resolve(kind, match["repo"], unquote(match["revision"]), unquote(match["path"]))
        else:
            self._refuse(404, "", f"no such address: {url.path}")

    def _folder(self, kind: str, name: str, revision: str, *, content: bool) -> tuple[str, Path] | None:
        """Return commit and folder, or refuse the request as the Hub does."""
        repository = self.hub.repositories.get((kind, name))
        is_known = self.headers.get("Authorization") is not None
        if repository is None or (repository.private and not is_known):
            self._refuse(404 if is_known else 401, "RepoNotFound", "Repository not found")
        elif repository.gated and content and not is_known:
            self._refuse(401, "GatedRepo", f"Access to model {name} is restricted")
        elif (found := repository.folder(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found
        return None

    def _api(self, kind: str, name: str, rest: str, query: dict[str, list[str]], body: bytes) -> None:
        action, _, rest = rest.partition("/")
        revision, _, path = rest.partition("/")
        found = self._folder(kind, name, unquote(revision), content=action != "revision")
        if found is None:
            return
        commit, folder = found
        if action == "revision":
            siblings = [{"rfilename": file} for file in sorted(_files(folder))]
            self._send_json(
                {
                    "id": name,
                    "sha": commit,
                    "private": self.hub.repositories[kind, name].private,
                    "tags": [],
                    "siblings": siblings,
                }
            )
        elif action == "tree":
            entries = _entries(folder, unquote(path), query.get("recursive") == ["true"])
            if path and not entries:
                self._refuse(404, "EntryNotFound", f"{path} does not exist")
            else:
                self._send_json(entries)
        elif action == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._send_json([entry for entry in _entries(folder, "", True) if entry["path"] in wanted])
        else:
            self._refuse(404, "", f"no such action: {action}")

    def _write(self, path: str, token: str | None, body: bytes) -> None:
        """Take a part of an upload: the repository, the way of each file, a large file, or the commit."""
        if path.startswith("/lfs/"):
            self.hub.uploaded[hashlib.sha256(body).hexdigest()] = body
            self._send_json({})
        elif token is None:
            self._refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] in self.hub.closed:
                self._refuse(403, "", "You don't have the rights to create a model under this namespace")
            else:
                is_new = self.hub.create(name, private=asked.get("visibility") == "private")
                self._send_json({"url": f"{self.hub.endpoint}/{name}"}, 200 if is_new else 409)
        elif "/preupload/" in path:
            modes = ((file["path"], _is_large(Path(file["path"]))) for file in json.loads(body)["files"])
            files = [
                {"path": p, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False} for p, large in modes
            ]
            self._send_json({"files": files})
        elif path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}", "header": {}}}
            self._send_json({"transfer": "basic", "objects": objects})
        else:
            name = "/".join(path.split("/")[3:5])
            commit = self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
            self._send_json({"commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"})

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        found = self._folder(kind, name, revision, content=True)
        if found is None:
            return
        commit, folder = found
        file = folder / path
        if path not in _files(folder):
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        if self.hub.storage is not None and _is_large(file):
            self.send_response(302)
            self.send_header("Location", self.hub.storage + self.path)
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("X-Linked-Etag", f'"{_etag(file)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        first = 0
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1])
            last = min(int(asked[2]) if asked[2] else len(content) - 1, len(content) - 1)
            part = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            part = content
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.slow.is_set():
            self.wfile.write(part[: min(100_000, len(part) // 2)])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.closing.wait()
            return
        self.wfile.write(part)

    def _send_json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._send_json({"error": message}, status, headers)

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the other side went first
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _entries(folder: Path, below: str, recursive: bool) -> list[dict]:
    """Return what the Hub lists of a folder: files with size and hash, and folders."""
    found = []
    for path in sorted((folder / below).rglob("*") if recursive else (folder / below).glob("*")):
        entry = {"path": path.relative_to(folder).as_posix(), "type": "file" if path.is_file() else "directory"}
        if path.is_file():
            digest, size = _etag(path), path.stat().st_size
            lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if _is_large(path) else {}
            entry |= {"oid": digest[:40], "size": size, **lfs}
        else:
            entry |= {"oid": hashlib.sha1(str(path).encode()).hexdigest(), "size": 0}
        found.append(entry)
    return found


def _is_large(file: Path) -> bool:
    return file.suffix in (".safetensors", ".parquet", ".bin")


def _etag(file: Path) -> str:
    """Return the hash that the Hub gives as ETag: that of git for a small file, SHA-256 for one in LFS."""
    content = file.read_bytes()
    if _is_large(file):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
