"""A small Hub on the loopback address, with the part of the HTTP API that `huggingface_hub` uses for models.

    with HubServer() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        HfApi().create_repo("tester/model")

A repository is a list of commits, and a commit maps every path to the content of its file. So a request either makes a
commit or leaves the repository unchanged. As on the real Hub, weights are uploaded to a separate store (Git LFS)
before the commit that names them. The store keeps what has arrived, so a second attempt sends only the rest. `drop`
makes the network fail. Unknown requests are answered with 404 and recorded in `unknown`.
"""

import base64
import hashlib
import json
import re
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers
from hub_repository import File, Refusal, Repository
from huggingface_hub import ModelCard, constants

USER = "tester"
WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"
LFS_SUFFIXES = (".safetensors", ".bin", ".png")

# `huggingface_hub` passes files to its HTTP library in a way that newer versions of that library deprecate.
IGNORE_UPLOAD_WARNING = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


class HubServer(ThreadingHTTPServer):
    """The server. It runs in a thread between `__enter__` and `__exit__`.

    Attributes:
        url: The endpoint for the client.
        repositories: All repositories by their id.
        lfs: The store of large files by their SHA-256.
        uploads: SHA-256 of the large files in the order of their arrival.
        requests: Method and path of every request.
        unknown: Requests that the server does not understand.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.drops: deque[str] = deque()
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        super().__exit__(*args)

    def drop(self, path_part: str, times: int = 1) -> None:
        """Closes the connection during the next `times` requests whose path contains `path_part`."""
        self.drops.extend([path_part] * times)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the content of every file in a repository."""
        repository = self.repositories[repo_id]
        return {path: file.content for path, file in repository.commits[repository.resolve(revision)].items()}

    def connect(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes this process and those it starts use this server as the Hub, and the folder `home` as its cache."""
        # The client read these from the environment when it was imported, and Transformers keeps a client.
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        # Xet would bypass this server, for another storage.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setenv("HF_HOME", str(home))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)


class Handler(BaseHTTPRequestHandler):
    """One request: finds the method that answers it, with the parts of its path as arguments."""

    protocol_version = "HTTP/1.1"
    server: HubServer
    routes: ClassVar[list[tuple[str, str, Callable[..., None]]]] = []

    def log_message(self, format: str, *args: object) -> None:
        """Logs nothing."""

    def answer(self) -> None:
        """Answers any request. The base class calls it."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        size = int(self.headers.get("Content-Length", 0))
        self.server.requests.append(f"{self.command} {self.path}")
        if self.server.drops and self.server.drops[0] in url.path:
            self.server.drops.popleft()
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(size)
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, function in self.routes:
            found = re.fullmatch(pattern, url.path)
            if found and route_method == method:
                try:
                    with self.server.lock:
                        function(self, **{name: unquote(part) for name, part in found.groupdict(default="").items()})
                except Refusal as refusal:
                    self.send(json.dumps({"error": str(refusal)}).encode(), refusal.status, refusal.headers)
                return
        self.server.unknown.append(f"{self.command} {self.path}")
        self.send(b"{}", 404)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Sends the answer. HEAD gets only the headers."""
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200) -> None:
        """Sends `value` as JSON."""
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def json(self) -> Any:
        """Returns the JSON that the client sent."""
        return json.loads(self.body)

    def token(self) -> str | None:
        """Returns the client's token, or None. Refuses tokens that do not exist."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, READ_TOKEN, WRITE_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def require_writer(self, namespace: str) -> None:
        """Refuses clients that may not write to repositories of `namespace`."""
        token = self.token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        if token != WRITE_TOKEN or namespace != USER:
            raise Refusal(403, f"You don't have the rights to write in the namespace {namespace}")

    def repository(self, repo_id: str, *, write: bool = False) -> Repository:
        """Returns the repository. One that the token may not see does not exist."""
        token = self.token()
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and token is None):
            # The real Hub sends no code without a token. Then the client recognises the error by the https address.
            raise Refusal(404 if token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.require_writer(repo_id.split("/")[0])
        return repository


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes the decorated function answer requests whose path matches `pattern`. {name} is a part of the path."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parts = {"{repo}": "(?P<repo>[^/]+/[^/]+)", "{revision}": "(?P<revision>[^/]+)", "{path}": "(?P<path>.+)"}
        expression = re.sub(r"\{\w+\}", lambda found: parts[found[0]], pattern)
        Handler.routes.append((method, expression, function))
        return function

    return register


@route("POST", "/api/repos/create")
def create_repo(request: Handler) -> None:
    wanted = request.json()
    repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
    request.require_writer(wanted["organization"] or USER)
    url = f"{request.server.url}/{repo_id}"
    if repo_id in request.server.repositories:
        return request.send_json({"error": "You already created this model repo", "url": url}, 409)
    repository = Repository(private=wanted.get("visibility") == "private")
    repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", is_lfs=False)})
    request.server.repositories[repo_id] = repository
    request.send_json({"url": url, "name": repo_id})


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Handler) -> None:
    """Checks metadata with the client's parser, and the licence. The Hub's own check is not published."""
    try:
        data = ModelCard(request.json()["content"]).data
        if not re.fullmatch(r"[a-z0-9.-]+", data.license or "unknown"):
            raise ValueError('"license" must be one of the identifiers of the Hub')
    except ValueError as error:
        return request.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if data.to_dict() else [{"message": "empty or missing yaml metadata in repo card"}]
    request.send_json({"errors": [], "warnings": warnings})


@route("GET", "/api/models/{repo}(/revision/{revision})?")
def model_info(request: Handler, repo: str, revision: str) -> None:
    repository = request.repository(repo)
    oid = repository.resolve(revision or "main")
    siblings = [{"rfilename": path} for path in repository.commits[oid]]
    request.send_json({"id": repo, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})


@route("POST", "/api/models/{repo}/branch/{revision}")
def create_branch(request: Handler, repo: str, revision: str) -> None:
    repository = request.repository(repo, write=True)
    if revision in repository.refs:
        raise Refusal(409, "Reference already exists")
    repository.refs[revision] = repository.resolve(request.json().get("startingPoint", "main"))
    request.send_json({})


@route("GET", "/api/models/{repo}/tree/{revision}(/{path})?")
def list_tree(request: Handler, repo: str, revision: str, path: str) -> None:
    repository = request.repository(repo)
    files = repository.commits[repository.resolve(revision)]
    entries = []
    for name, file in files.items():
        if name.startswith(f"{path}/" if path else ""):
            lfs = {"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.is_lfs else {}
            entries.append({"type": "file", "path": name, "oid": file.oid, "size": len(file.content)} | lfs)
    if path and not entries:
        raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
    request.send_json(entries)


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(request: Handler, repo: str, revision: str) -> None:
    repository = request.repository(repo, write="create_pr" not in request.query)
    present = repository.commits[repository.resolve(revision)]
    answers = []
    for file in request.json()["files"]:
        mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
        known = {"oid": present[file["path"]].oid} if file["path"] in present else {}
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | known)
    request.send_json({"files": answers})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(request: Handler, repo: str) -> None:
    request.repository(repo)
    answers = []
    for wanted in request.json()["objects"]:
        url = f"{request.server.url}/lfs/{wanted['oid']}"
        actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        answers.append(wanted | ({} if wanted["oid"] in request.server.lfs else {"actions": actions}))
    request.send_json({"transfer": "basic", "objects": answers})


@route("PUT", "/lfs/{path}")
def lfs_upload(request: Handler, path: str) -> None:
    if hashlib.sha256(request.body).hexdigest() != path:
        raise Refusal(400, "The content is not what its address says")
    request.server.lfs[path] = request.body
    request.server.uploads.append(path)
    request.send(b"")


@route("POST", "/lfs/{revision}/verify")
def lfs_verify(request: Handler, revision: str) -> None:
    if len(request.server.lfs[revision]) != request.json()["size"]:
        raise Refusal(400, "Wrong size")
    request.send_json({})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(request: Handler, repo: str, revision: str) -> None:
    opens_pr = "create_pr" in request.query
    repository = request.repository(repo, write=not opens_pr)
    files = dict(repository.commits[repository.resolve(revision)])
    for line in request.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        match operation["key"]:
            case "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            case "lfsFile":
                files[value["path"]] = File(request.server.lfs[value["oid"]], is_lfs=True)
            case "deletedFile":
                del files[value["path"]]
    number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
    oid = repository.commit(f"refs/pr/{number}" if opens_pr else revision, files)
    url = f"{request.server.url}/{repo}"
    answer = {"success": True, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
    request.send_json(answer | ({"pullRequestUrl": f"{url}/discussions/{number}"} if opens_pr else {}))


@route("GET", "/{repo}/resolve/{revision}/{path}")
def download(request: Handler, repo: str, revision: str, path: str) -> None:
    repository = request.repository(repo)
    oid = repository.resolve(revision)
    headers = {"X-Repo-Commit": oid}
    file = repository.commits[oid].get(path)
    if file is None:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.headers |= headers
        raise refusal
    request.send(file.content, headers=headers | {"ETag": f'"{file.oid}"'})
