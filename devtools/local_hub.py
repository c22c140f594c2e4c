"""A Hub on loopback: serves directories over the part of the HTTP API that huggingface_hub uses.

    with LocalHub({"demo/arithmetic": Path("demo/model")}) as hub:
        ...  # HF_ENDPOINT=hub.url

    python -m devtools.local_hub --port 0 demo/arithmetic=demo/model   # prints its URL; exits with 0 on SIGTERM

A repository is listed once, when it is added: `main` names a commit of the paths and contents at that time. Content is
read on request, so a test that changes a file makes the Hub send wrong bytes.

Every request passes as `Request -> Response -> fault -> wire`. A fault is a function that may replace the response:
other bytes, another status, slower, or truncated. While it blocks, the Hub hangs before the headers. `requests` records
requests, statuses and sent bytes.

Supported: model info, tree, resolve (GET, HEAD, Range, ETag, X-Repo-Commit, X-Linked-Size, X-Linked-Etag), X-Error-Code
on errors, bearer tokens for gated and private repositories. Not supported: pagination, Xet, redirects to a CDN,
uploads, repositories other than models.
"""

import argparse
import contextlib
import hashlib
import json
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_THRESHOLD_BYTES = 1 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".pt", ".pth", ".onnx", ".msgpack", ".ckpt")
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Blob:
    """One file of a commit, at the time when the repository was added."""

    source: Path
    size: int
    sha256: str
    git_sha1: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_sha1


@dataclass
class Repository:
    """Commits by id, and the revisions that name them."""

    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.revisions.get(revision)


@dataclass
class Request:
    """A request, with its status and sent bytes once it is done."""

    method: str
    path: str
    headers: Mapping[str, str]
    """By lower-case name."""
    kind: str = "other"
    """`info`, `tree`, `resolve` or `other`."""
    repository: str = ""
    file: str = ""
    status: int = 0
    sent_bytes: int = 0
    """Bytes of the body."""


@dataclass
class Response:
    """The response; a fault may change any of it."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | Path = b""
    offset: int = 0
    length: int = 0
    """Content-Length, from `offset` on."""
    bytes_per_second: float | None = None
    cut_after_bytes: int | None = None
    """Reset the connection after this many bytes of the body, as a dying server does."""
    ends_in_order: bool = False
    """Close the connection instead of resetting it, as a proxy does: the client receives all bytes sent."""


Fault = Callable[[Request, Response], Response]


class LocalHub:
    """A Hub that listens on 127.0.0.1 after construction and responds between `__enter__` and `__exit__`.

    `bytes_per_second` throttles each body, `token` opens gated and private repositories, `fault` may change every
    response. All three may be set while the Hub runs. With a `certificate` (with its key), it serves HTTPS.
    """

    def __init__(
        self,
        repositories: Mapping[str, Path] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str = "hf_local",  # noqa: S107 - opens nothing but this hub
        bytes_per_second: float | None = None,
        fault: Fault | None = None,
        certificate: Path | None = None,
    ) -> None:
        self.token = token
        self.bytes_per_second = bytes_per_second
        self.fault = fault
        self.requests: list[Request] = []
        self._repositories: dict[str, Repository] = {}
        for name, directory in (repositories or {}).items():
            self.add(name, directory)
        self._server = _Server((host, port), self)
        self._scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="local-hub", daemon=True)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()

    def add(
        self, name: str, directory: Path, *, revision: str = "main", gated: bool = False, private: bool = False
    ) -> str:
        """Commit the present content of a directory, and let a revision name it; returns the commit."""
        files = _files(directory)
        commit = _commit(files)
        repository = self._repositories.setdefault(name, Repository())
        repository.commits[commit] = files
        repository.revisions[revision] = commit
        repository.gated, repository.private = gated, private
        return commit

    def commit(self, name: str, revision: str = "main") -> str:
        return self._repositories[name].revisions[revision]

    def blobs(self, name: str, revision: str = "main") -> dict[str, Blob]:
        """Return the files of a commit by path; a test may change them to make the Hub lie."""
        return self._repositories[name].commits[self.commit(name, revision)]

    def downloads(self) -> Counter[str]:
        """Return the number of downloads by path in the repository."""
        return Counter(r.file for r in self.requests if r.kind == "resolve" and r.method == "GET" and r.status < 400)

    def sent_bytes(self) -> Counter[str]:
        """Return the bytes of content sent, by path in the repository."""
        sent: Counter[str] = Counter()
        for request in self.requests:
            if request.kind == "resolve":
                sent[request.file] += request.sent_bytes
        return sent

    def forget(self) -> None:
        """Reset the recorded requests."""
        self.requests.clear()

    def answer(self, request: Request) -> Response:
        response = self._answer(request)
        response.bytes_per_second = self.bytes_per_second
        return self.fault(request, response) if self.fault else response

    def _answer(self, request: Request) -> Response:
        url = urlsplit(request.path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", url.path):
            request.kind = "info"
            name = match[1]
            return self._in_commit(
                request, name, match[2] or "main", lambda commit, files: self._info(name, commit, files)
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", url.path):
            request.kind = "tree"
            recursive = parse_qs(url.query).get("recursive", [""])[0].lower() == "true"
            return self._in_commit(request, match[1], match[2], lambda _, files: _tree(files, recursive=recursive))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            request.kind, request.file = "resolve", unquote(match[3])
            return self._in_commit(request, match[1], match[2], lambda commit, files: _resolve(request, commit, files))
        return _error(404, "NotFound", "no such page on this hub")

    def _in_commit(
        self,
        request: Request,
        name: str,
        revision: str,
        then: Callable[[str, dict[str, Blob]], Response],
    ) -> Response:
        request.repository = name
        repository = self._repositories.get(name)
        authorization = request.headers.get("authorization")
        allowed = authorization == f"Bearer {self.token}"
        restricted = repository is None or repository.private or repository.gated
        if restricted and authorization is not None and not allowed:
            return _error(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not allowed):
            # The real Hub does not tell anonymous clients whether a repository exists.
            return _error(404 if allowed else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not allowed and request.kind == "resolve":
            return _error(401, "GatedRepo", f"Access to model {name} is restricted")
        commit = repository.resolve(unquote(revision))
        if commit is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return then(commit, repository.commits[commit])

    def _info(self, name: str, commit: str, files: dict[str, Blob]) -> Response:
        repository = self._repositories[name]
        return _json(
            {
                "_id": hashlib.sha256(name.encode()).hexdigest()[:24],
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repository.private,
                "gated": "auto" if repository.gated else False,
                "disabled": False,
                "tags": [],
                "siblings": [{"rfilename": path} for path in files],
            }
        )


def commit_of(directory: Path) -> str:
    """Return the commit that `LocalHub.add` makes of the present content of a directory."""
    return _commit(_files(directory))


def _files(directory: Path) -> dict[str, Blob]:
    return {
        path.relative_to(directory).as_posix(): _blob(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != ".git"
    }


def _blob(path: Path) -> Blob:
    size = path.stat().st_size
    sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            sha256.update(chunk)
            git_sha1.update(chunk)
    lfs = path.suffix in LFS_SUFFIXES or size > LFS_THRESHOLD_BYTES
    return Blob(path, size, sha256.hexdigest(), git_sha1.hexdigest(), lfs)


def _commit(files: Mapping[str, Blob]) -> str:
    lines = "".join(f"{path}\0{blob.sha256}\n" for path, blob in sorted(files.items()))
    return hashlib.sha1(lines.encode(), usedforsecurity=False).hexdigest()


def _tree(files: Mapping[str, Blob], *, recursive: bool) -> Response:
    entries: dict[str, dict[str, object]] = {}
    for path, blob in sorted(files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(folder.encode(), usedforsecurity=False).hexdigest()
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entry: dict[str, object] = {"type": "file", "oid": blob.git_sha1, "size": blob.size, "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        entries[path] = entry
    return _json([entry for path, entry in entries.items() if recursive or "/" not in path])


def _resolve(request: Request, commit: str, files: Mapping[str, Blob]) -> Response:
    blob = files.get(request.file)
    if blob is None:
        response = _error(404, "EntryNotFound", "Entry not found")
        response.headers["X-Repo-Commit"] = commit
        return response
    headers = {
        "ETag": f'"{blob.etag}"',
        "X-Repo-Commit": commit,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
    }
    if blob.lfs:
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-Etag": f'"{blob.etag}"'}
    byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if byte_range is None:
        return Response(200, headers, blob.source, 0, blob.size)
    first, last = int(byte_range[1]), min(int(byte_range[2] or blob.size - 1), blob.size - 1)
    if first > last:
        return Response(416, headers | {"Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
    return Response(206, headers, blob.source, first, last - first + 1)


def _json(content: object) -> Response:
    body = json.dumps(content).encode()
    return Response(200, {"Content-Type": "application/json"}, body, 0, len(body))


def _error(status: int, code: str | None, message: str) -> Response:
    response = _json({"error": message})
    response.status = status
    response.headers["X-Error-Message"] = message
    if code is not None:
        response.headers["X-Error-Code"] = code
    return response


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, address: tuple[str, int], hub: LocalHub) -> None:
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, _Exchange)

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._lock:
            self._connections.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            with self._lock:
                self._connections.discard(request)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        # No FIN before closing, so that a connection can also end with a reset.
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError | ValueError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def close_connections(self) -> None:
        """End connections that clients keep alive, so that no thread waits for their next request."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Exchange(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        pass

    def do_GET(self) -> None:
        self._exchange()

    def do_HEAD(self) -> None:
        self._exchange()

    def _exchange(self) -> None:
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        response = self.server.hub.answer(request)
        request.status = response.status
        self.server.hub.requests.append(request)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(response.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(response.body, bytes):
            self._send(request, response, response.body)
            return
        with response.body.open("rb") as content:
            content.seek(response.offset)
            left = response.length
            while left and (chunk := content.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                self._send(request, response, chunk)
        if left:
            # The file is shorter than promised: the client must not wait for the rest.
            self.close_connection = True

    def _send(self, request: Request, response: Response, content: bytes) -> None:
        if response.cut_after_bytes is not None and request.sent_bytes + len(content) > response.cut_after_bytes:
            content = content[: response.cut_after_bytes - request.sent_bytes]
            request.sent_bytes += len(content)
            self.wfile.write(content)
            if not response.ends_in_order:
                # With linger 0, closing sends RST instead of FIN: what a client sees when a server dies.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            raise ConnectionResetError
        pace = CHUNK_BYTES if response.bytes_per_second is None else max(1, int(response.bytes_per_second / 50))
        for start in range(0, len(content), pace):
            piece = content[start : start + pace]
            # Count first: the client may read the count as soon as it has the bytes.
            request.sent_bytes += len(piece)
            self.wfile.write(piece)
            if response.bytes_per_second is not None:
                time.sleep(len(piece) / response.bytes_per_second)


def main(words: Sequence[str] | None = None) -> int:
    """Serve directories until SIGTERM or Ctrl-C; the first line on stdout is the URL."""
    parser = argparse.ArgumentParser(prog="python -m devtools.local_hub", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 in a pod")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--bytes-per-second", type=float, help="throttle every download to this rate")
    parser.add_argument("repositories", nargs="+", metavar="OWNER/NAME=DIR")
    arguments = parser.parse_args(words)
    repositories: dict[str, Path] = {}
    for pair in arguments.repositories:
        name, equals, directory = pair.partition("=")
        if not equals or name.count("/") != 1 or not Path(directory).is_dir():
            parser.error(f"{pair!r} is not OWNER/NAME=DIR with an existing directory")
        repositories[name] = Path(directory)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with LocalHub(
        repositories, host=arguments.host, port=arguments.port, bytes_per_second=arguments.bytes_per_second
    ) as hub:
        sys.stdout.write(hub.url + "\n")
        sys.stdout.flush()
        ended.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
