"""A Hub on loopback: the part of the Hub's HTTP API that `huggingface_hub` needs to push and to load a model.

It is written against huggingface_hub 1.33 and 2.4 with `HF_HUB_DISABLE_XET=1`. Objects are files named by their digest
in a folder; trees and branches are kept in memory. A request can be made to fail in the middle, once, to see what is
left behind.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard

TOKEN = "hf_loopback"
BLOCK = 1 << 14
# A dead client closes its end at once; the limit is for a test that forgot to end one.
PATIENCE_SECONDS = 30


class HubError(Exception):
    """An answer other than success: HTTP status, the Hub's error code, and its message."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **headers}


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. `oid` is the SHA-256 of a large file, the git SHA-1 of any other."""

    oid: str
    size: int
    is_large: bool


@dataclass
class Repository:
    """Commits by hash, each the whole tree by path; branches by name; one line of history for every commit."""

    name: str
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)

    def resolve(self, revision: str) -> str:
        """Return the commit that a branch or commit hash names."""
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, branch: str, summary: str, tree: dict[str, StoredFile]) -> str:
        """Make `tree` the state of `branch`, in one step."""
        parent = self.branches.get(branch)
        content = json.dumps([parent, summary, sorted((path, file.oid) for path, file in tree.items())])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = tree
        self.branches[branch] = commit
        self.history.append((branch, summary))
        return commit


@dataclass(frozen=True)
class Request:
    """One line of the server's log; `status` is 0 for a connection that was cut."""

    method: str
    path: str
    range: str | None
    status: int


@dataclass
class Fault:
    """A single failure in the middle of the body of the first matching request.

    `kind` is "error" (500 after an upload was read), "drop" (the connection is closed) or "hold" (nothing more happens
    until the client is gone; `reached` tells the test when).
    """

    method: str
    path: str
    kind: str
    reached: threading.Event = field(default_factory=threading.Event)


class Cut(Exception):
    """The connection must be closed without an answer."""


class HubServer(ThreadingHTTPServer):
    """The server; use it as a context manager. `folder` stores the objects."""

    daemon_threads = False  # Closing then waits for every connection's thread.

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.busy: set[str] = set()  # Paths that contain one of these parts are answered with 503.
        self.objects = folder / "objects"
        self.objects.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.changing = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._connections):  # A client in this same process keeps its own connections open.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Record the connection, to end it if the server ends first."""
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        """Forget the connection."""
        self._connections.discard(request)
        super().shutdown_request(request)

    @property
    def endpoint(self) -> str:
        """Return the value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail_once(self, method: str, path: str, kind: str) -> Fault:
        """Make the first `method` request whose path contains `path` fail; see [`Fault`]."""
        fault = Fault(method, path, kind)
        self.faults.append(fault)
        return fault

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Return and remove the fault meant for this request."""
        with self.changing:
            for fault in self.faults:
                if fault.method == method and fault.path in path:
                    self.faults.remove(fault)
                    return fault
        return None

    def repository(self, name: str) -> Repository:
        """Return the repository `name`, which must exist."""
        if name not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[name]

    def create(self, name: str) -> Repository:
        """Create an empty repository."""
        with self.changing:
            if name in self.repositories:
                raise HubError(409, "You already created this model repo")
            self.repositories[name] = repository = Repository(name)
            repository.commit("main", "initial commit", {})
        return repository

    def store(self, content: bytes) -> StoredFile:
        """Store a small file."""
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (self.objects / oid).write_bytes(content)
        return StoredFile(oid, len(content), is_large=False)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        """Return the content of a file, for a test to check."""
        repository = self.repository(name)
        return (self.objects / repository.commits[repository.resolve(revision)][path].oid).read_bytes()

    def files(self, name: str, revision: str = "main") -> set[str]:
        """Return the paths of a revision, for a test to check."""
        repository = self.repository(name)
        return set(repository.commits[repository.resolve(revision)])


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE_SECONDS

    def do_GET(self) -> None:
        """Look the path up in `ROUTES` and answer; the other verbs do the same."""
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.status = 0
        try:
            if any(part in parts.path for part in self.server.busy):
                raise HubError(503, "Busy")
            for method, pattern, action in ROUTES:
                match = pattern.fullmatch(unquote(parts.path))
                if match and method == self.command.replace("HEAD", "GET"):
                    action(self, *match.groups())
                    break
            else:
                raise HubError(501, f"{self.command} {parts.path} is not part of this Hub")
        except HubError as error:
            self._discard_body()
            self._send_json({"error": str(error), **self._details(error)}, error.status, error.headers)
        except (Cut, ConnectionError, TimeoutError):
            self.status, self.close_connection = 0, True
        self.server.requests.append(Request(self.command, parts.path, self.headers["Range"], self.status))

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's output clean; `HubServer.requests` is the log."""

    # --- repositories

    def create_repository(self) -> None:
        """`POST /api/repos/create`."""
        self._require_token()
        given = self._read_json()
        name = f"{given.get('organization') or 'me'}/{given['name']}"
        self.conflict_url = {"url": f"{self.server.endpoint}/{name}"}
        self.server.create(name)
        self._send_json({**self.conflict_url, "name": name})

    def validate_card(self) -> None:
        """`POST /api/validate-yaml`: the metadata must be a YAML mapping, and name a licence by its identifier."""
        try:
            metadata = ModelCard(self._read_json()["content"]).data.to_dict()
        except (ValueError, yaml.YAMLError) as error:
            raise HubError(400, f"Invalid metadata: {error}") from error
        if not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "other")):
            raise HubError(400, '"license" must be an identifier')
        self._send_json({"errors": [], "warnings": []})

    def create_branch(self, name: str, branch: str) -> None:
        """`POST /api/models/NAME/branch/BRANCH`."""
        self._require_token()
        repository = self.server.repository(name)
        start = self._read_json().get("startingPoint", "main")
        with self.server.changing:
            if branch in repository.branches:
                raise HubError(409, "Reference already exists")
            repository.branches[branch] = repository.resolve(start)
        self._send_json({})

    def model_info(self, name: str, revision: str | None) -> None:
        """`GET /api/models/NAME[/revision/REVISION]`."""
        commit, tree = self._tree(name, revision or "main")
        info = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in sorted(tree)]}
        if "README.md" in tree:
            card = ModelCard((self.server.objects / tree["README.md"].oid).read_text("utf-8"))
            info["cardData"] = card.data.to_dict()
        self._send_json(info)

    def list_tree(self, name: str, revision: str, folder: str | None) -> None:
        """`GET /api/models/NAME/tree/REVISION[/FOLDER]`."""
        _, tree = self._tree(name, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in tree.items() if path.startswith(prefix)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            inside = {path: file for path, file in inside.items() if "/" not in path.removeprefix(prefix)}
        self._send_json([_entry(path, file) for path, file in sorted(inside.items())])

    # --- uploads

    def preupload(self, name: str, revision: str) -> None:
        """`POST /api/models/NAME/preupload/REVISION`: which files are large."""
        self._require_token()
        _, tree = self._tree(name, revision)
        answers = []
        for given in self._read_json()["files"]:
            is_large = given["path"].endswith(".safetensors") or given["size"] > 10_000_000
            answer = {"path": given["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            known = tree.get(given["path"])
            answers.append(answer | ({"oid": known.oid} if known else {}))
        self._send_json({"files": answers})

    def lfs_batch(self, name: str) -> None:
        """`POST /NAME.git/info/lfs/objects/batch`: where to put the large files that are missing here."""
        self._require_token()
        objects = []
        for given in self._read_json()["objects"]:
            upload = {"href": f"{self.server.endpoint}/lfs/{name}/{given['oid']}"}
            verify = {"href": f"{self.server.endpoint}/verify"}
            is_here = (self.server.objects / given["oid"]).exists()
            objects.append(given if is_here else {**given, "actions": {"upload": upload, "verify": verify}})
        self._send_json({"transfer": "basic", "objects": objects})

    def receive_object(self, name: str, oid: str) -> None:
        """`PUT /lfs/NAME/OID`: the object is kept only if it is complete."""
        fault = self.server.take_fault("PUT", self.path)
        half, received, digest = int(self.headers.get("Content-Length", 0)) // 2, 0, hashlib.sha256()
        with tempfile.NamedTemporaryFile(dir=self.server.objects.parent) as part:
            for block in self._body():
                part.write(block)
                digest.update(block)
                received += len(block)
                if fault and received >= half:
                    self._fail(fault)
            if fault or digest.hexdigest() != oid:
                raise HubError(500 if fault else 400, "The upload did not work out")
            part.flush()
            shutil.copyfile(part.name, self.server.objects / oid)
        self._send(b"")

    def verify_object(self) -> None:
        """`POST /verify`."""
        given = self._read_json()
        path = self.server.objects / given["oid"]
        if not path.exists() or path.stat().st_size != given["size"]:
            raise HubError(404, "There is no such object")
        self._send_json({})

    def commit(self, name: str, branch: str) -> None:
        """`POST /api/models/NAME/commit/BRANCH`: all of the changes are made, or none."""
        self._require_token()
        lines = [json.loads(line) for line in b"".join(self._body()).splitlines()]
        header, *changes = lines
        repository = self.server.repository(name)
        with self.server.changing:
            tree = dict(repository.commits[repository.resolve(branch)])
            for change in changes:
                self._apply(change["key"], change["value"], tree)
            commit = repository.commit(branch, header["value"]["summary"], tree)
        url = f"{self.server.endpoint}/{name}/commit/{commit}"
        self._send_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _apply(self, key: str, value: dict[str, Any], tree: dict[str, StoredFile]) -> None:
        if key == "file":
            tree[value["path"]] = self.server.store(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not (self.server.objects / value["oid"]).exists():
                raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
            tree[value["path"]] = StoredFile(value["oid"], value["size"], is_large=True)
        elif key == "deletedFile":
            del tree[value["path"]]
        else:
            raise HubError(400, f"A commit cannot contain {key}")

    # --- downloads

    def resolve_file(self, name: str, revision: str, path: str) -> None:
        """`GET` or `HEAD /NAME/resolve/REVISION/PATH`. Large files come from here too, not from another host."""
        commit, tree = self._tree(name, revision)
        if path not in tree:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", **{"X-Repo-Commit": commit})
        self._send_object(tree[path].oid, {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

    def _send_object(self, oid: str, headers: dict[str, str]) -> None:
        content = (self.server.objects / oid).read_bytes()
        headers = {**headers, "ETag": f'"{oid}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._send(content, 200, headers)
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        if first >= len(content):
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        self._send(part, 206, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"})

    # --- helpers

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, StoredFile]]:
        repository = self.server.repository(name)
        commit = repository.resolve(revision)
        return commit, repository.commits[commit]

    def _require_token(self) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")

    def _body(self) -> Iterator[bytes]:
        """Yield the request's body in blocks; an end before its announced end closes the connection."""
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self._read_exactly(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            block = self._read_exactly(min(left, BLOCK))
            left -= len(block)
            yield block

    def _read_exactly(self, size: int) -> bytes:
        block = self.rfile.read(size)
        if len(block) < size:
            raise Cut
        return block

    def _discard_body(self) -> None:
        if not getattr(self, "body_read", False):
            list(self._body())

    def _read_json(self) -> Any:
        return json.loads(b"".join(self._body()))

    def _details(self, error: HubError) -> dict[str, Any]:
        """Return the fields that the client reads from the body of an error: the existing repository, or the card's
        fault.
        """
        if error.status == 409:
            return getattr(self, "conflict_url", {})
        return {"errors": [{"message": str(error)}]} if error.status == 400 else {}

    def _send_json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(answer).encode()
        self._send(content, status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.body_read = False  # A kept connection continues with the next request.
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.server.take_fault(self.command, self.path) if self.command == "GET" else None
        if fault:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._fail(fault)
        self.wfile.write(content)

    def _fail(self, fault: Fault) -> None:
        """Perform `fault` in the middle of a body; an "error" reads the body to its end first."""
        fault.reached.set()
        if fault.kind == "drop":
            raise Cut
        if fault.kind == "hold":
            while self.rfile.read(BLOCK):
                continue
            raise Cut


def _entry(path: str, file: StoredFile) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if not file.is_large:
        return entry
    return {**entry, "lfs": {"oid": file.oid, "size": file.size, "pointerSize": 134}}


_NAME = r"/([^/]+/[^/]+)"
ROUTES = [
    (method, re.compile(pattern), action)
    for method, pattern, action in (
        ("POST", r"/api/repos/create", Handler.create_repository),
        ("POST", r"/api/validate-yaml", Handler.validate_card),
        ("POST", rf"/api/models{_NAME}/branch/(.+)", Handler.create_branch),
        ("POST", rf"/api/models{_NAME}/preupload/(.+)", Handler.preupload),
        ("POST", rf"/api/models{_NAME}/commit/(.+)", Handler.commit),
        ("POST", rf"{_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("POST", r"/verify", Handler.verify_object),
        ("PUT", rf"/lfs{_NAME}/([0-9a-f]+)", Handler.receive_object),
        ("GET", rf"/api/models{_NAME}(?:/revision/(.+))?", Handler.model_info),
        ("GET", rf"/api/models{_NAME}/tree/([^/]+)(?:/(.+))?", Handler.list_tree),
        ("GET", rf"{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve_file),
    )
]


def client_environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a client that knows only this Hub."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not re.match(r"HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", name.upper())
    }
    settings = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    return {**inherited, **settings, **more}
