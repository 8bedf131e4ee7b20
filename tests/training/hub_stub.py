"""A hub on 127.0.0.1 that speaks what ``create_repo`` and ``upload_folder`` need, and keeps it."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import yaml

#: may read only, may write, and whose commits fail
READER, WRITER, UNLUCKY = "hf_reader", "hf_writer", "hf_unlucky"


class Hub(ThreadingHTTPServer):
    """Files of each repository and branch, and the requests that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo][branch]

    def write(self, repo: str, folder: Path, branch: str = "main") -> Path:
        """The repository as a folder, as somebody else downloads it."""
        for name, content in self.files(repo, branch).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def do_GET(self) -> None:
        self.server.asked.append(f"GET {self.path}")
        found = re.match(r"/api/models/([\w-]+/[\w.-]+)(/[^?]*)?", self.path)
        if not found or found[1] not in self.server.repos:
            return self.answer({"error": "Repository not found"}, 404)
        repo, rest = found[1], found[2] or ""
        if rest == "/auth-check/write":
            return self.answer({} if self.token != READER else {"error": "read-only token"},
                               200 if self.token != READER else 403)  # fmt: skip
        if rest.startswith("/tree/"):
            files = self.server.repos[repo].get(rest.split("/")[2], {})
            entries = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40}
                       for p, c in files.items()]  # fmt: skip
            return self.answer(entries)
        return self.answer({"id": repo, "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        if self.token not in (READER, WRITER, UNLUCKY):
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if self.token == READER and repo not in self.server.repos:
                return self.answer({"error": "You don't have the rights to create a model"}, 403)
            self.server.created.append(asked)
            known = repo in self.server.repos
            self.server.repos.setdefault(repo, {"main": {}})
            return self.answer({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)
        if self.path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            for name in [header.get("base_model"), *(header.get("datasets") or [])]:
                if name is not None and not re.fullmatch(r"[\w-]+/[\w.-]+", name):
                    return self.answer({"errors": [{"message": f"{name} is no id"}]}, 400)
            return self.answer({"errors": [], "warnings": []})
        found = re.match(
            r"/api/models/([\w-]+/[\w.-]+)/(preupload|commit|branch)/([\w.-]+)", self.path
        )
        if not found:
            self.server.problems.append(self.path)
            return self.answer({"error": "no such route"}, 404)
        repo, what, branch = found[1], found[2], found[3]
        if what == "branch":
            self.server.repos[repo].setdefault(branch, {})
            return self.answer({})
        if what == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for one in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        if self.token == UNLUCKY:
            return self.answer({"error": "the disk is full"}, 507)
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                self.server.repos[repo][branch][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del self.server.repos[repo][branch][value["path"]]
        url = f"{self.server.url}/{repo}/commit/{'1' * 40}"
        return self.answer({"commitUrl": url, "commitOid": "1" * 40, "success": True})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().strip() or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


@contextmanager
def online(hub: Hub, patch: Any) -> Iterator[None]:
    """This process asks that hub, and no other: the tests run offline otherwise."""
    from huggingface_hub import hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    with patch.context() as own:
        own.setattr(constants, "ENDPOINT", hub.url)
        # what was made before keeps the address that it was made with
        own.setattr(hf_api.api, "endpoint", hub.url)
        own.setattr(transformers_hub, "_hf_api", None)
        own.setattr(constants, "HF_HUB_OFFLINE", False)
        own.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        own.delenv("HF_TOKEN", raising=False)
        _http.close_session()
        yield
    _http.close_session()
