# SPDX-License-Identifier: Apache-2.0
"""A Hub on this machine that the unmodified huggingface_hub client talks to, over LFS or over Xet.

It keeps repositories with their commits, tags and privacy, asks for a token, and refuses what the real one refuses. `fail`
makes it answer the next matching request with an error, or close the connection in its middle; `hold` leaves it without an
answer. `requests` lists what it was asked. Xet content goes where the client's own storage layer puts it for a `local://` address.

    with LocalHub(folder) as hub:
        subprocess.run(command, env={**os.environ, **hub.environment()})
"""

import base64
import hashlib
import json
import re
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from urllib.parse import unquote, urlsplit

import yaml

OWNER, READER = "hf_of_the_owner", "hf_that_only_reads"  # tokens
NAMESPACE = "owner"
REPO = r"(?P<kind>models|spaces|datasets)/(?P<repo>[^/]+/[^/]+)"
LARGE = (".safetensors", ".png")  # by name, as the real Hub's .gitattributes has it


@dataclass
class File:
    sha256: str  # of the content, under which it is kept
    oid: str  # git blob id; of an LFS file, of its pointer
    size: int
    large: bool


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, File]]  # by id, oldest first
    messages: list[str]
    tags: dict[str, str] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # a Space's SDK and variables

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def files(self, revision: str) -> tuple[str, dict[str, File]]:
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, self.commits[commit]


class Refusal(Exception):
    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None, **content: str
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.content = status, code, headers or {}, content


class LocalHub:
    def __init__(self, folder: Path, *, xet: bool = False) -> None:
        self.folder, self.xet = folder, xet
        self.paid = True  # else no Gradio Space can be made
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the body
        self._faults: list[tuple[str, str, int | Event | None]] = []
        self._lock = Lock()
        (folder / "objects").mkdir(parents=True)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, *, token: str | None = OWNER, home: Path | None = None) -> dict[str, str]:
        """What a new process needs to talk to this Hub and to no other."""
        home = home or self.folder / "home"
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, method: str, pattern: str, status: int | None) -> None:
        """Answer the next request whose path matches with `status`, or, if it is None, break it off."""
        self._faults.append((method, pattern, status))

    def hold(self, method: str, pattern: str) -> Event:
        """Never answer the next request whose path matches; the event is set once half of its body is here."""
        half = Event()
        self._faults.append((method, pattern, half))
        return half

    def next_fault(self, method: str, path: str) -> tuple[str, str, int | Event | None] | None:
        with self._lock:
            for fault in self._faults:
                if fault[0] == method and re.search(fault[1], path):
                    self._faults.remove(fault)
                    return fault
        return None

    def content(self, file: File) -> bytes:
        return (self.folder / "objects" / file.sha256).read_bytes()

    def keep(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        (self.folder / "objects" / sha256).write_bytes(content)
        return sha256

    def put(self, kind: str, name: str, folder: Path) -> None:
        """Make a public repository of the files in `folder`."""
        contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        files = {
            path: File(self.keep(content), _git_blob(content), len(content), path.endswith(LARGE))
            for path, content in contents.items()
        }
        self.repos[kind, name] = Repo(private=False, commits={}, messages=[])
        self.commit(self.repos[kind, name], "initial commit", files)

    def has(self, sha256: str) -> bool:
        return (self.folder / "objects" / sha256).exists() or sha256 in self.xet_hashes()

    def xet_hashes(self) -> dict[str, str]:
        """Xet hash of every uploaded file by its SHA-256, from the shards in which the client recorded them."""
        found = {}
        for shard in (self.folder / "cas").rglob("shards/*.mdb"):
            content = shard.read_bytes()
            at = 48  # header
            while content[at : at + 32] != b"\xff" * 32:  # the bookend of the file section
                xet_hash = content[at : at + 32]
                flags, segments = struct.unpack_from("<II", content, at + 32)
                at += 48 * (1 + segments * (2 if flags >> 31 else 1))  # flag: each segment has a verification entry
                if flags >> 30 & 1:  # flag: an entry with the SHA-256
                    found[_hex(content[at : at + 32])] = _hex(xet_hash)
                    at += 48
        return found

    def commit(self, repo: Repo, message: str, files: dict[str, File]) -> str:
        state = json.dumps([repo.messages, message, {path: file.oid for path, file in files.items()}])
        commit = hashlib.sha1(f"{len(repo.commits)} {state}".encode()).hexdigest()
        repo.commits[commit] = files
        repo.messages.append(message)
        return commit


def _hex(merkle_hash: bytes) -> str:
    """A hash as Xet prints it: four little-endian numbers."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", merkle_hash))


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        fault = hub.next_fault(self.command, path)
        if fault and not isinstance(fault[2], int):
            self.rfile.read(length // 2)
            if fault[2]:
                fault[2].set()
                while self.connection.recv(1 << 16):  # until the client is gone
                    pass
            self.close_connection = True
            self.connection.close()
            return
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(length)
        hub.requests.append((self.command, path, len(body)))
        try:
            if fault:
                raise Refusal(fault[2], "", f"made to fail with {fault[2]}")
            for method, pattern, action in ROUTES:
                if method == self.command and (found := re.fullmatch(pattern, path)):
                    with hub._lock:
                        status, headers, answer = action(self, body, **found.groupdict())
                    break
            else:
                raise Refusal(404, "", f"no such route: {self.command} {path}")
        except Refusal as refusal:
            answer = json.dumps({"error": str(refusal), **refusal.content}).encode()
            status, headers = refusal.status, {"X-Error-Message": str(refusal), **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def user(self, *, write: bool = False) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in (OWNER, READER):
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        if write and token == READER:
            raise Refusal(403, "", "You don't have the rights to create or change this repository")
        return token

    def repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if write:
            self.user(write=True)
        elif repo and repo.private and OWNER not in (self.headers.get("Authorization") or ""):
            repo = None
        if repo is None:
            raise Refusal(
                401 if not self.headers.get("Authorization") else 404, "RepoNotFound", "Repository not found"
            )
        return repo

    def whoami(self, body: bytes) -> tuple:
        token = self.user()
        role = "write" if token == OWNER else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return _json({"type": "user", "name": NAMESPACE, "isPro": self.hub.paid, "orgs": [], "auth": access})

    def create(self, body: bytes) -> tuple:
        self.user(write=True)
        asked = json.loads(body)
        kind = asked.get("type", "model") + "s"
        name = f"{asked.get('organization') or NAMESPACE}/{asked['name']}"
        if not name.startswith(f"{NAMESPACE}/"):
            raise Refusal(403, "", f"You don't have the rights to create a {kind[:-1]} under this namespace")
        url = f"{self.hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.hub.repos:
            raise Refusal(409, "", "You already created this repo", url=url)
        if kind == "spaces" and not self.hub.paid:
            raise Refusal(402, "", "A subscription is needed to create a Gradio Space")
        repo = Repo(asked.get("visibility") == "private", {}, [], settings=asked)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.hub.commit(repo, "initial commit", {".gitattributes": self._regular(attributes)})
        self.hub.repos[kind, name] = repo
        return _json({"url": url, "name": name})

    def _regular(self, content: bytes) -> File:
        return File(self.hub.keep(content), _git_blob(content), len(content), large=False)

    def info(self, body: bytes, kind: str, repo: str, revision: str = "main") -> tuple:
        found = self.repo(kind, repo)
        commit, files = found.files(revision)
        siblings = [{"rfilename": path} for path in files]
        return _json({"id": repo, "sha": commit, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, kind: str, repo: str, revision: str) -> tuple:
        _, files = self.repo(kind, repo).files(revision)
        hashes = self.hub.xet_hashes()
        rows = []
        for path, file in files.items():
            row = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.large:
                row["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
                if file.sha256 in hashes:
                    row["xetHash"] = hashes[file.sha256]
            rows.append(row)
        return _json(rows)

    def validate_yaml(self, body: bytes) -> tuple:
        content = json.loads(body)["content"]
        errors = []
        try:
            if not isinstance(yaml.safe_load(content.split("---")[1]), dict):
                errors.append({"message": "metadata is not a mapping"})
        except (IndexError, yaml.YAMLError) as error:
            errors.append({"message": str(error)})
        status, headers, answer = _json({"errors": errors, "warnings": []})
        return (400 if errors else status), headers, answer

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> tuple:
        _, files = self.repo(kind, repo, write=True).files(revision)
        rows = []
        for file in json.loads(body)["files"]:
            path, known = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) or file["size"] > 10_000_000 else "regular"
            oid = known and (known.sha256 if known.large else known.oid)
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": rows})

    def make_commit(self, body: bytes, kind: str, repo: str, revision: str) -> tuple:
        found = self.repo(kind, repo, write=True)
        commit, files = found.files(revision)
        files, header = dict(files), {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
                if value.get("parentCommit") not in (None, commit):
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif line["key"] == "file":
                files[value["path"]] = self._regular(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not self.hub.has(value["oid"]):
                    raise Refusal(400, "", f"{value['path']}: its content was never uploaded")
                pointer = f"oid sha256:{value['oid']}\nsize {value['size']}\n".encode()
                files[value["path"]] = File(value["oid"], _git_blob(pointer), value["size"], large=True)
        commit = self.hub.commit(found, header["summary"], files)
        return _json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def tag(self, body: bytes, kind: str, repo: str, revision: str) -> tuple:
        found, name = self.repo(kind, repo, write=True), json.loads(body)["tag"]
        if name in found.tags:
            raise Refusal(409, "", f"Tag {name} exists")
        found.tags[name] = found.files(revision)[0]
        return _json({})

    def refs(self, body: bytes, kind: str, repo: str) -> tuple:
        found = self.repo(kind, repo)
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": to} for tag, to in found.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.head}
        return _json({"branches": [main], "converts": [], "tags": tags})

    def lfs_batch(self, body: bytes, repo: str, prefix: str | None = None) -> tuple:
        self.repo("spaces" if prefix else "models", repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.hub.has(wanted["oid"]):
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(row)
        return _json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "content does not match its hash")
        self.hub.keep(body)
        return 200, {}, b""

    def xet_token(self, body: bytes, kind: str, repo: str, access: str, revision: str) -> tuple:
        self.repo(kind, repo, write=access == "write")
        address, expires = f"local://{self.hub.folder.absolute()}/cas", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": address, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        status, json_header, answer = _json({"casUrl": address, "accessToken": "xet", "exp": expires})
        return status, {**json_header, **headers}, answer

    def resolve(self, body: bytes, repo: str, revision: str, path: str, prefix: str | None = None) -> tuple:
        kind = "spaces" if prefix else "models"
        commit, files = self.repo(kind, repo).files(revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist", {"X-Repo-Commit": commit})
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 if file.large else file.oid}"'}
        if file.large and (xet_hash := self.hub.xet_hashes().get(file.sha256)):
            route = f"{self.hub.url}/api/{kind}/{repo}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "X-Linked-Size": str(file.size)}
            if self.command == "HEAD":
                return 200, headers, b""
        return 200, headers, self.hub.content(file)


def _json(content: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"/api/{REPO}", _Handler.info),
    ("GET", f"/api/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", f"/api/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", f"/api/{REPO}/refs", _Handler.refs),
    ("POST", f"/api/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", f"/api/{REPO}/commit/(?P<revision>[^/]+)", _Handler.make_commit),
    ("POST", f"/api/{REPO}/tag/(?P<revision>[^/]+)", _Handler.tag),
    ("GET", f"/api/{REPO}/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)", _Handler.xet_token),
    ("POST", "/(?P<prefix>spaces/)?(?P<repo>[^/]+/[^/]+).git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    *(
        (method, "/(?P<prefix>spaces/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve)
        for method in ("HEAD", "GET")
    ),
]  # fmt: skip
