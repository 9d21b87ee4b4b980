"""A Hub on loopback: the part of its HTTP API that `huggingface_hub` uses to create, fill and read a model repository.

    with HubServer() as hub:            # serves in threads of this process
        subprocess.run(..., env=hub.environment(home))
        hub.files("me/model")           # path -> bytes, as the last commit left them

Spoken: whoami, create, validate-yaml, preupload, LFS (batch, PUT, verify), commit (NDJSON), info, tree, resolve (HEAD,
GET, ETag). One user, `me`, and one token that may write. `faults` makes storage fail as networks and services do.
"""

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN, READ_ONLY_TOKEN = "me", "hf_write_token_of_me", "hf_read_token_of_me"
STORED_APART = (".safetensors", ".bin", ".pt", ".pth", ".pkl")  # what the Hub keeps in LFS, by its .gitattributes


class Repo:
    """Commits, newest last: (commit id, message, path -> content)."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, str, dict[str, bytes]]] = [(_sha1(b"start"), "initial commit", {})]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit id and files, or None where there is no such revision."""
        for oid, _, files in reversed(self.commits):
            if revision in ("main", "HEAD", oid):
                return oid, files
        return None


class HubServer:
    """The server; a context manager. `faults` is a list of names that are consumed one by one: "cut" (the connection
    breaks in the middle of an upload) and "refuse" (storage answers 403)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, bytes]:
        """What is in the repository now."""
        return self.repos[repo].commits[-1][2]

    def uploaded(self, repo: str) -> dict[str, set[bytes]]:
        """Everything that was ever in it: path -> contents."""
        found: dict[str, set[bytes]] = {}
        for _, _, files in self.repos[repo].commits:
            for path, content in files.items():
                found.setdefault(path, set()).add(content)
        return found

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this server for the Hub, with a cache of its own."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"} | ({"HF_TOKEN": token} if token else {})
        return kept | ours


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _blob_id(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _is_stored_apart(path: str) -> bool:
    return path.endswith(STORED_APART)


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    # ---- plumbing --------------------------------------------------------------------------------------------------

    def _body(self, at_most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
                if at_most is not None and len(data) >= at_most:
                    return data
            self.rfile.readline()
            return data
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if at_most is None else min(length, at_most))

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | named)

    def _error(self, status: int, message: str, code: str = "") -> None:
        self._json({"error": message}, status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    @property
    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _may_write(self) -> bool:
        if self._token == TOKEN:
            return True
        if self._token == READ_ONLY_TOKEN:
            self._error(403, "You don't have the rights to write to this repository")
        else:
            self._error(401, "Invalid username or password.")
        return False

    def _readable(self, name: str) -> Repo | None:
        """The repository; where it is missing, or private to this caller, the Hub's answer for both is sent."""
        repo = self.server_hub.repos.get(name)
        if repo is None or (repo.private and self._token not in (TOKEN, READ_ONLY_TOKEN)):
            self._error(404 if self._token in (TOKEN, READ_ONLY_TOKEN) else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def _at(self, name: str, revision: str) -> tuple[Repo, str, dict[str, bytes]] | None:
        """A readable repository, with commit id and files of a revision; where there is none, the answer is sent."""
        repo = self._readable(name)
        if repo is None:
            return None
        found = repo.at(revision)
        if found is None:
            self._error(404, "Revision not found", "RevisionNotFound")
            return None
        return repo, *found

    # ---- requests --------------------------------------------------------------------------------------------------

    def _parts(self) -> list[str]:
        path = urlsplit(self.path).path
        self.server_hub.requests.append(f"{self.command} {path}")
        return [unquote(part) for part in path.strip("/").split("/")]

    def do_GET(self) -> None:
        match self._parts():
            case ["api", "whoami-v2"]:
                if self._token in (TOKEN, READ_ONLY_TOKEN):
                    self._json({"name": USER, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
                else:
                    self._error(401, "Invalid username or password.")
            case ["api", "models", user, name]:
                self._info(f"{user}/{name}", "main")
            case ["api", "models", user, name, "revision", revision]:
                self._info(f"{user}/{name}", revision)
            case ["api", "models", user, name, "tree", revision, *folder]:
                self._tree(f"{user}/{name}", revision, "/".join(folder))
            case [user, name, "resolve", revision, *path]:
                self._resolve(f"{user}/{name}", revision, "/".join(path))
            case _:
                self._error(404, f"no such page: {self.path}")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        hub = self.server_hub
        match parts:
            case ["api", "repos", "create"]:
                if self._may_write():
                    self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._validate(json.loads(body)["content"])
            case ["api", "models", user, name, "preupload", _]:
                repo = self._readable(f"{user}/{name}")
                if repo is not None and self._may_write():
                    self._preupload(repo, json.loads(body)["files"])
            case [user, name, "info", "lfs", "objects", "batch"]:
                repo = self._readable(f"{user}/{name.removesuffix('.git')}")
                if repo is not None and self._may_write():
                    self._json(
                        {"transfer": "basic", "objects": [self._upload_action(o) for o in json.loads(body)["objects"]]}
                    )
            case ["storage", "verify"]:
                asked = json.loads(body)
                there = len(hub.stored.get(asked["oid"], b"")) == asked["size"]
                self._json({}) if there else self._error(400, "object is not there")
            case ["api", "models", user, name, "commit", _]:
                repo = self._readable(f"{user}/{name}")
                if repo is not None and self._may_write():
                    self._commit(f"{user}/{name}", repo, [json.loads(line) for line in body.splitlines()])
            case _:
                self._error(404, f"no such page: {self.path}")

    def do_PUT(self) -> None:
        *_, oid = self._parts()
        fault = self.server_hub.faults.pop(0) if self.server_hub.faults else None
        if fault == "cut":
            self._body(at_most=100)
            self.close_connection = True
            self.connection.close()
            return
        data = self._body()
        if fault == "refuse":
            self._error(403, "Request has expired")
        elif hashlib.sha256(data).hexdigest() != oid:
            self._error(400, "the content is not what was announced")
        else:
            self.server_hub.stored[oid] = data
            self._send(200, b"", {"ETag": f'"{oid}"'})

    # ---- what they mean --------------------------------------------------------------------------------------------

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server_hub.url}/{name}"
        if name.split("/")[0] != USER:
            self._error(403, f"You don't have the rights to create a model under the namespace {name.split('/')[0]!r}")
        elif name in self.server_hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server_hub.repos[name] = Repo(private)
            self._json({"url": url, "name": name, "id": name})

    def _validate(self, content: str) -> None:
        try:
            front = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
            assert isinstance(front, dict)
            assert all(isinstance(tag, str) for tag in front.get("tags") or [])
        except (yaml.YAMLError, AssertionError) as error:
            self._json({"errors": [{"message": f"bad YAML: {error}"}], "warnings": []}, 400)
        else:
            self._json({"errors": [], "warnings": []})

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        there = repo.commits[-1][2]
        answers = []
        for path in (file["path"] for file in files):
            apart = _is_stored_apart(path)
            oid = None
            if path in there:
                oid = hashlib.sha256(there[path]).hexdigest() if apart else _blob_id(there[path])
            answers.append(
                {"path": path, "uploadMode": "lfs" if apart else "regular", "shouldIgnore": False, "oid": oid}
            )
        self._json({"files": answers})

    def _upload_action(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server_hub.stored:
            return asked
        base = f"{self.server_hub.url}/storage"
        return asked | {"actions": {"upload": {"href": f"{base}/{asked['oid']}"}, "verify": {"href": f"{base}/verify"}}}

    def _commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> None:
        with self.server_hub.lock:
            files, message = dict(repo.commits[-1][2]), ""
            for line in lines:
                value = line["value"]
                match line["key"]:
                    case "header":
                        message = value["summary"]
                    case "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    case "lfsFile":
                        if value["oid"] not in self.server_hub.stored:
                            self._error(400, f"the content of {value['path']} was not uploaded")
                            return
                        files[value["path"]] = self.server_hub.stored[value["oid"]]
                    case "deletedFile":
                        files.pop(value["path"], None)
            oid = _sha1(f"{repo.commits[-1][0]}{len(repo.commits)}".encode())
            repo.commits.append((oid, message, files))
        self._json({"commitUrl": f"{self.server_hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _info(self, name: str, revision: str) -> None:
        found = self._at(name, revision)
        if found is None:
            return
        repo, oid, files = found
        siblings = [{"rfilename": path} for path in sorted(files)]
        self._json({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        found = self._at(name, revision)
        if found is None:
            return
        _, _, files = found
        entries = []
        for path, content in sorted(files.items()):
            if path.startswith(f"{folder}/" if folder else ""):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
                if _is_stored_apart(path):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
                entries.append(entry)
        if folder and not entries:
            self._error(404, "Entry not found", "EntryNotFound")
        else:
            self._json(entries)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._at(name, revision)
        if found is None:
            return
        _, oid, files = found
        if path not in files:
            self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if _is_stored_apart(path) else _blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": oid, "Content-Type": "application/octet-stream"}
        self._send(200, content, headers)
