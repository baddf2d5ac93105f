"""A small Hub on 127.0.0.1, for the real client: repositories in memory, git and LFS files, tokens, troubles.

It answers what `huggingface_hub` and `datasets` ask over HTTP, and refuses as the Hub refuses. Xet, the Hub's newer
way for large files, is no plain HTTP: clients are started with HF_HUB_DISABLE_XET=1 and send them as LFS objects.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.parquet filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = (".safetensors", ".parquet", ".npz", ".bin")
MAX_REGULAR_BYTES = 10_000_000
PART_BYTES = 200_000  # larger objects go in parts, so that tests see both ways with small files
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
PREFIXES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
REPO = r"(?P<id>[\w.-]+/[\w.-]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?" + REPO
TREE_PAGE = 10  # entries of one answer, so that clients have to ask for the next


@dataclass(frozen=True)
class Entry:
    """A file in a commit; of an LFS file git keeps a pointer, which is what its git id is of."""

    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.is_lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    """A repository: its commits, the newest last, and what its owner chose."""

    kind: str
    id: str
    private: bool
    sdk: str | None = None
    commits: list[tuple[str, str, dict[str, Entry]]] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, Entry]) -> str:
        text = json.dumps([self.id, len(self.commits), message, {path: entry.oid for path, entry in files.items()}])
        self.commits.append((hashlib.sha1(text.encode()).hexdigest(), message, files))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, Entry]]:
        for sha, _, files in reversed(self.commits):
            if revision in ("main", "refs/heads/main", sha):
                return sha, files
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


@dataclass
class Trouble:
    """Something that goes wrong with requests whose "METHOD path" holds a text, so many times.

    Args:
        where: the text.
        status: the answer, or 0 for a connection that is cut once half of the request's body is read.
        headers: of the answer.
        times: how often; then all is well.
        message: what the server says.
        after: the work is done first, and only the answer is lost.
    """

    where: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 10**6
    message: str = ""
    after: bool = False


class Refusal(Exception):
    """A status other than success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub(ThreadingHTTPServer):
    """The server and all it remembers.

    Attributes:
        tokens: token to the user it is of; a user whose name begins with "reader" may not write.
        requests: "METHOD path" of all requests.
        stall: where set, a request whose path ends so waits for its last byte until the client is gone.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # Large files come from another host, as they do there: what the Hub says of a file is in the redirection.
        self.cdn_url = f"http://localhost:{self.server_address[1]}"
        self.tokens = {"hf_writer": "me", "hf_other": "other", "hf_reader": "reader"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.troubles: list[Trouble] = []
        self.stall: str | None = None
        self.stalled = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""

    def trouble(self, what: str, after: bool) -> Trouble | None:
        with self.lock:
            for trouble in self.troubles:
                if trouble.where in what and trouble.times > 0 and trouble.after == after:
                    trouble.times -= 1
                    return trouble
        return None

    def commits_of(self, kind: str, repo_id: str) -> list[str]:
        """Commit ids after the one that every new repository begins with."""
        return [sha for sha, _, _ in self.repos[(kind, repo_id)].commits[1:]]

    def files_of(self, kind: str, repo_id: str) -> dict[str, Entry]:
        return self.repos[(kind, repo_id)].commits[-1][2]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    # The way of a request

    def _serve(self) -> None:
        split = urlsplit(self.path)
        what = f"{self.command} {unquote(split.path)}"
        self.server.requests.append(what)
        trouble = self.server.trouble(what, after=False)
        if trouble is not None and trouble.status == 0:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._cut()
            return
        body = self._body()
        if trouble is not None:
            self._answer(trouble.status, {"error": trouble.message or "trouble"}, trouble.headers)
            return
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        try:
            with self.server.lock:
                answer = self._route(unquote(split.path), body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            answer = (refusal.status, {"error": refusal.message}, headers)
        if self.server.trouble(what, after=True) is not None:
            self._cut()
            return
        self._answer(*answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        size = int(self.headers.get("Content-Length", 0))
        if self.server.stall and self.path.endswith(self.server.stall) and size:
            self.rfile.read(size - 1)
            self.server.stalled.set()
            self.rfile.read(1)  # comes, or the client is dead
            raise ConnectionAbortedError
        return self.rfile.read(size)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def _answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream"} | (headers or {})
        if not isinstance(content, bytes):
            headers["Content-Type"] = "application/json"
            if isinstance(content, dict) and "error" in content:
                headers["X-Error-Message"] = content["error"]
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> tuple[Any, ...]:
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return getattr(self, action)(body, **match.groupdict())
        raise Refusal(404, "", f"no such address: {self.command} {path}")

    # Who asks, and for what

    @property
    def user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def _repo(self, kind: str | None, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user, self.server.repos.get((kind or "models", repo_id))
        owner = repo_id.partition("/")[0]
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != owner:
            raise Refusal(403, "", f"You don't have the rights to write to {repo_id}")
        return repo

    # Answers

    def whoami(self, body: bytes) -> tuple[Any, ...]:
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        return 200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes) -> tuple[Any, ...]:
        asked = json.loads(body)
        owner = asked.get("organization") or self.user
        kind, repo_id = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{PREFIXES[kind]}{repo_id}"
        if self.user is None:
            raise Refusal(401, "", "Invalid username or password.")
        if owner != self.user or owner.startswith("reader"):
            raise Refusal(403, "", f"You don't have the rights to create a {kind[:-1]} under the namespace {owner}")
        if (kind, repo_id) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        if kind == "spaces" and asked.get("sdk") not in {"gradio", "docker", "static"}:
            raise Refusal(400, "", "sdk is missing")
        repo = Repo(kind, repo_id, asked.get("visibility") == "private", asked.get("sdk"))
        repo.commit("initial commit", {".gitattributes": Entry(GITATTRIBUTES, False)})
        self.server.repos[(kind, repo_id)] = repo
        return 200, {"url": url, "name": repo_id, "id": repo_id}

    def validate(self, body: bytes) -> tuple[Any, ...]:
        asked = json.loads(body)
        errors, fields = [], None
        parts = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        try:
            fields = yaml.safe_load(parts[1]) if parts else None
        except yaml.YAMLError as error:
            errors.append(str(error))
        if fields is not None and not isinstance(fields, dict):
            errors.append("the metadata is no mapping")
        elif fields and asked["repoType"] == "space":
            errors += [f'"{key}" is required' for key in ("title", "sdk", "app_file") if not fields.get(key)]
            errors += [f'"{k}" must be one of {COLOURS}' for k in ("colorFrom", "colorTo") if fields[k] not in COLOURS]
            errors += ['"short_description" is too long'] if len(fields.get("short_description", "")) > 60 else []
        elif fields and "model-index" in fields:
            results = [result for model in fields["model-index"] for result in model["results"]]
            complete = all({"task", "dataset", "metrics"} <= set(r) and r["dataset"]["type"] for r in results)
            errors += [] if complete else ["an entry of the model-index is not complete"]
        warnings = [] if fields else [{"message": "empty or missing yaml metadata in repo card"}]
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": warnings}

    def preupload(self, body: bytes, kind: str, id: str, revision: str) -> tuple[Any, ...]:
        _, there = self._repo(kind, id, write=True).at(revision)
        answers = []
        for asked in json.loads(body)["files"]:
            path, entry = asked["path"], there.get(asked["path"])
            binary = b"\0" in base64.b64decode(asked["sample"])
            large = path.endswith(LFS_SUFFIXES) or asked["size"] > MAX_REGULAR_BYTES or binary
            oid = None if entry is None else entry.sha256 if entry.is_lfs else entry.oid
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}

    def lfs_batch(self, body: bytes, kind: str | None, id: str) -> tuple[Any, ...]:
        self._repo(kind, id, write=True)
        answers = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                href, header = f"{self.server.url}/lfs/{oid}", {}
                if size > PART_BYTES:
                    numbers = range(1, -(-size // PART_BYTES) + 1)
                    header = {"chunk_size": str(PART_BYTES)} | {str(n): f"{href}/{n}" for n in numbers}
                verify = {"href": f"{self.server.url}/verify/{oid}"}
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
            answers.append(answer)
        return 200, {"transfer": "basic", "objects": answers}

    def lfs_put(self, body: bytes, oid: str) -> tuple[Any, ...]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "", "the object is not what its id says")
        self.server.objects[oid] = body
        return 200, b""

    def lfs_part(self, body: bytes, oid: str, part: str) -> tuple[Any, ...]:
        self.server.parts.setdefault(oid, {})[int(part)] = body
        return 200, b"", {"ETag": hashlib.md5(body).hexdigest()}

    def lfs_complete(self, body: bytes, oid: str) -> tuple[Any, ...]:
        parts = self.server.parts[oid]
        return self.lfs_put(b"".join(parts[p["partNumber"]] for p in json.loads(body)["parts"]), oid)

    def lfs_verify(self, body: bytes, oid: str) -> tuple[Any, ...]:
        if oid not in self.server.objects:
            raise Refusal(404, "", "no such object")
        return 200, {}

    def commit(self, body: bytes, kind: str, id: str, revision: str) -> tuple[Any, ...]:
        repo = self._repo(kind, id, write=True)
        head, files = repo.at(revision)
        files = dict(files)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = Entry(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, "", f"the object of {path} never arrived")
                files[path] = Entry(self.server.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                raise Refusal(400, "", f"unknown operation {line['key']}")
        sha = repo.commit(header["summary"], files)
        return 200, {"commitUrl": f"{self.server.url}/{PREFIXES[kind]}{id}/commit/{sha}", "commitOid": sha}

    def info(self, body: bytes, kind: str, id: str, revision: str = "main") -> tuple[Any, ...]:
        repo = self._repo(kind, id)
        sha, files = repo.at(revision)
        siblings = [{"rfilename": path} for path in files]
        facts = {"id": id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "sdk": repo.sdk}
        return 200, facts | {"author": id.partition("/")[0], "downloads": 0, "likes": 0, "gated": False}

    def refs(self, body: bytes, kind: str, id: str) -> tuple[Any, ...]:
        sha, _ = self._repo(kind, id).at("main")
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha}
        return 200, {"branches": [branch], "tags": [], "converts": []}

    def tree(self, body: bytes, kind: str, id: str, revision: str, path: str = "") -> tuple[Any, ...]:
        _, files = self._repo(kind, id).at(revision)
        path = path or ""
        if path and not any(name.startswith(f"{path}/") for name in files):
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        entries = self._entries(files, path, self.query.get("recursive", "").lower() in ("1", "true"))
        start = int(self.query.get("cursor", 0))
        headers = {}
        if len(entries) > start + TREE_PAGE:
            again = "&".join(f"{key}={value}" for key, value in self.query.items() if key != "cursor")
            address = f"{self.server.url}{urlsplit(self.path).path}?{again}&cursor={start + TREE_PAGE}"
            headers["Link"] = f'<{address}>; rel="next"'
        return 200, entries[start : start + TREE_PAGE], headers

    def paths_info(self, body: bytes, kind: str, id: str, revision: str) -> tuple[Any, ...]:
        _, files = self._repo(kind, id).at(revision)
        asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        return 200, [entry for entry in self._entries(files, "", True) if entry["path"] in asked]

    @staticmethod
    def _entries(files: dict[str, Entry], under: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, entry in sorted(files.items()):
            if under and not name.startswith(f"{under}/"):
                continue
            parts = name.removeprefix(f"{under}/" if under else "").split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = "/".join([*([under] if under else []), *parts[:depth]])
                oid = hashlib.sha1(folder.encode()).hexdigest()
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
            if recursive or len(parts) == 1:
                facts = {"type": "file", "path": name, "size": len(entry.data), "oid": entry.oid}
                lfs = {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 130}
                found[name] = facts | ({"lfs": lfs} if entry.is_lfs else {})
        return list(found.values())

    def resolve(self, body: bytes, kind: str | None, id: str, revision: str, path: str) -> tuple[Any, ...]:
        sha, files = self._repo(kind, id).at(revision)
        if path not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
        entry = files[path]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not entry.is_lfs:
            return self._ranged(entry.data, headers | {"ETag": f'"{entry.oid}"'})
        self.server.objects[entry.sha256] = entry.data
        linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.data))}
        return 302, b"", headers | linked | {"Location": f"{self.server.cdn_url}/cdn/{entry.sha256}"}

    def cdn(self, body: bytes, oid: str) -> tuple[Any, ...]:
        return self._ranged(self.server.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[Any, ...]:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "HEAD" or not asked:
            return 200, data, headers
        start, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return 206, data[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"}


REVISION = r"(?P<revision>[^/]+|refs/heads/main)"
ROUTES = (
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/{KIND}/{REPO}/preupload/{REVISION}", "preupload"),
    ("POST", rf"/api/{KIND}/{REPO}/commit/{REVISION}", "commit"),
    ("POST", rf"/api/{KIND}/{REPO}/paths-info/{REVISION}", "paths_info"),
    ("GET", rf"/api/{KIND}/{REPO}/refs", "refs"),
    ("GET", rf"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/{KIND}/{REPO}/revision/{REVISION}", "info"),
    ("GET", rf"/api/{KIND}/{REPO}", "info"),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>\w{64})/(?P<part>\d+)", "lfs_part"),
    ("POST", r"/lfs/(?P<oid>\w{64})", "lfs_complete"),
    ("POST", r"/verify/(?P<oid>\w{64})", "lfs_verify"),
    ("GET HEAD", PAGE + rf"/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    ("GET HEAD", r"/cdn/(?P<oid>\w{64})", "cdn"),
)


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that serves until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


if __name__ == "__main__":
    with running_hub() as own:
        print(own.url)
        while True:
            time.sleep(1)
