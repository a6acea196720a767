"""A small server that answers the client of the Hugging Face hub like the hub: repositories, branches, commits, files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = re.compile(r"[0-9a-f]{40}")


class FakeHub(ThreadingHTTPServer):
    """The hub of the user `me`, whose repositories are dicts of files by branch."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.made: list[dict] = []  # what repositories were asked for
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.gated: dict[str, int] = {}
        """What the files of a gated repository are answered with: 401, or 403 for a user who has not accepted."""
        self.n_gets: Counter[str] = Counter()
        """How often something of a repository was asked for."""

    def commit(self, repository: str, branch: str) -> str:
        return hashlib.sha1(f"{repository}@{branch}".encode()).hexdigest()

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        named = {self.commit(*key): files for key, files in self.branches.items()}
        return named[revision] if COMMIT.fullmatch(revision) else self.branches[repository, revision]


@contextmanager
def running() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while n := int(self.rfile.readline(), 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if self.headers.get("Authorization") != "Bearer hf_mine":
            self._send(401, b"{}", X_Error_Message="Invalid username or password.")
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.made.append(asked)
            hub.branches.setdefault((f"me/{asked['name']}", "main"), {})
            self._json({"url": f"{hub.url}/me/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            _, _, owner, name, action, revision = self.path.strip("/").split("/")
            repository = f"{owner}/{name}"
            if action == "branch":
                hub.branches.setdefault((repository, revision), dict(hub.branches[repository, "main"]))
                self._json({})
            elif action == "preupload":
                files = json.loads(body)["files"]
                upload = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self._json({"files": [{"path": file["path"], **upload} for file in files]})
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.branches[repository, revision][line["value"]["path"]] = content
                commit = hub.commit(repository, revision)
                self._json({"commitUrl": f"{hub.url}/{repository}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        hub, (first, *parts) = self.server, self.path.split("?")[0].strip("/").split("/")
        repository = "/".join(parts[1:3] if first == "api" else (first, *parts[:1]))
        hub.n_gets[repository] += 1
        if code := hub.gated.get(repository):
            self._send(code, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
            return
        if first != "api":  # OWNER/NAME/resolve/REVISION/FILE
            owner, (name, _, revision, file) = first, parts
            content = hub.files(f"{owner}/{name}", revision).get(file)
            commit = revision if COMMIT.fullmatch(revision) else hub.commit(f"{owner}/{name}", revision)
            if content is None:
                self._send(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            else:
                self._send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=commit)
        elif len(parts) == 5:  # models/OWNER/NAME/revision or tree/REVISION
            _, owner, name, action, revision = parts
            files = hub.files(f"{owner}/{name}", revision)
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            about = {
                "id": f"{owner}/{name}",
                "sha": hub.commit(f"{owner}/{name}", revision),
                "private": False,
                "tags": [],
            }
            self._json(listed if action == "tree" else {**about, "siblings": [{"rfilename": path} for path in files]})
        else:
            self._send(404)

    do_HEAD = do_GET
